"""The comparison of drafters: its statistics by hand, its recipes equal but for what is compared, and one small run."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks import drafters
from benchmarks.drafter_report import table
from benchmarks.drafter_results import Comparison, Measured, read_results
from dspark.errors import InvalidConfiguration
from dspark.train.settings import read_toml
from dspark.train.texts import Text, save_texts
from train.conftest import data, target_folder

__all__ = ["data", "target_folder"]  # fixtures
RECIPES = Path(__file__).parents[2] / "recipes" / "compare"


def measured(name: str, seed: int, *prompts: list[int]) -> Measured:
    """Drafts of two; at length one every round accepts one token at most."""
    short = [[min(1, a) for a in prompt] for prompt in prompts]
    return Measured(name, seed, 1, 10, 5, 100, {"math": [short, list(prompts)], "code": [short, list(prompts)]})


def test_tau_is_tokens_per_round_over_all_prompts_and_seeds() -> None:
    found = Comparison([measured("a", 0, [2, 0], [1]), measured("a", 1, [2, 2], [])])
    assert found.tau("a", "math").value == pytest.approx((3 + 1 + 2 + 3 + 3) / 5)
    assert found.tau("a", "math", 1).value == pytest.approx((2 + 1 + 2 + 2 + 2) / 5)
    assert found.acceptance("a", "math", at_least=4) == [4 / 5, 3 / 4]
    assert math.isnan(found.acceptance("a", "math", at_least=5)[1])
    assert found.tau("a").low < found.tau("a").value < found.tau("a").high


def test_what_prompts_have_in_common_cancels() -> None:
    """Taus differ a lot from prompt to prompt, and the drafters by the same factor on each."""
    rounds = [[0, 0], [1, 1], [2, 2]]
    found = Comparison([measured("a", 0, *rounds), measured("b", 0, *map(list, rounds))])
    same = found.ratio("a", "b")
    assert (same.low, same.value, same.high) == (1, 1, 1)
    assert found.tau("a").high - found.tau("a").low > 0.3


def test_only_seeds_that_all_drafters_have_are_compared() -> None:
    found = Comparison([measured("a", 0, [0], [0]), measured("a", 1, [2], [2]), measured("b", 0, [1], [1])])
    assert found.seeds == [0] and found.tau("a").value == 1.0


def test_unequal_runs_are_not_compared() -> None:
    with pytest.raises(InvalidConfiguration, match=r"b of seed 0 has 5 steps and prompts \{.math.: 1"):
        Comparison([measured("a", 0, [0], [0]), measured("b", 0, [1])])


def test_recipes_differ_in_the_drafter_and_its_losses_only() -> None:
    tables = {path.stem: read_toml(path) for path in RECIPES.glob("*.toml")}
    assert set(tables) >= {"eagle3", "dflash", "dflash-l1", "dspark", "dspark-rnn", "dspark-1-layer", "dspark-3-layers"}
    reference = tables["dspark"]
    for name, own in tables.items():
        assert own["train"] == reference["train"], name
        assert own["drafter"]["target_layer_ids"] == reference["drafter"]["target_layer_ids"], name
        assert own["drafter"].get("block_size", own["drafter"].get("ttt_length")) == 7, name
    assert tables["dflash-l1"]["loss"] == reference["loss"] == tables["eagle3-l1"]["loss"]


def test_the_ablation_changes_one_thing_at_a_time() -> None:
    tables = {path.stem: read_toml(path) for path in (RECIPES.parent / "ablation").rglob("*.toml")}
    reference = tables["reference"]
    for name, own in tables.items():
        assert (own["drafter"], own["loss"]) == (reference["drafter"], reference["loss"]), name
        assert {k for k, _ in own["train"].items() ^ reference["train"].items()} <= set(drafters.LEARNING), name
    assert tables["adamw"] == reference
    names = ("with-muon", "with-muon-mean", "with-muon-mean-start", "with-muon-mean-start-head")
    steps = [tables[name]["train"] for name in names]
    for before, after in pairwise(steps):
        assert len(after.items() - before.items()) == 1
    attached, detached = (
        read_toml(RECIPES.parent / "confidence" / f"{name}.toml") for name in ("attached", "detached")
    )
    assert attached == tables["with-muon-mean-start-head"]
    assert detached == attached | {"loss": attached["loss"] | {"detach_confidence": True}}


SMALL = """[drafter]
kind = "{kind}"
target_layer_ids = [0, 1]
{length} = 3
[train]
steps = {steps}
tokens_per_batch = 128
anchors_per_batch = 16
num_validation = 2
validation_prompts = 0
"""
SOURCES = """sources = [
    {path = "sums/chat.jsonl", domain = "math", share = 1},
    {path = "words/chat.jsonl", domain = "code", share = 1},
]
[regenerate]
"""


def test_a_small_run_goes_on_where_time_was_up(
    target_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipes").mkdir()
    for name, kind, length in (("eagle3", "eagle3", "ttt_length"), ("dflash", "dflash", "block_size")):
        text = SMALL.format(kind=kind, length=length, steps=2)
        (tmp_path / "recipes" / f"{name}.toml").write_text(text, encoding="utf-8")
    rows = [Text.after_prompt(torch.arange(i, i + 20), 4) for i in range(10, 20)]
    (tmp_path / "texts").mkdir()
    save_texts(rows, tmp_path / "texts" / "shard-00000.safetensors")
    (tmp_path / "sources.toml").write_text(SOURCES, encoding="utf-8")
    places = {"target": target_folder, "texts": tmp_path / "texts", "data": data, "recipes": tmp_path / "recipes"}
    places |= {"sources": tmp_path / "sources.toml", "out": tmp_path / "out"}
    flags = [part for name, value in places.items() for part in (f"--{name}", str(value))]
    flags += ["--prompts", "2", "--max-new", "12", "--seeds", "1", "--plot"]
    drafters.main([*flags, "--minutes", "0"])
    assert "time is up in seed 0" in capsys.readouterr().out and not read_results(tmp_path / "out")
    drafters.main(flags)
    told = capsys.readouterr().out
    found = Comparison(read_results(tmp_path / "out"))
    assert found.names == ["dflash", "eagle3"] and found.num_prompts == {"math": 2, "code": 2}
    assert all(run.steps == 2 for runs in found.runs.values() for run in runs)
    assert table(found) in told and (tmp_path / "out" / "length.png").stat().st_size > 5000
    assert 1 <= found.tau("eagle3").value <= 4
    (tmp_path / "recipes" / "eagle3.toml").write_text(SMALL.format(kind="eagle3", length="ttt_length", steps=3))
    with pytest.raises(InvalidConfiguration, match=r"dflash\.toml have different \[train\] tables"):
        drafters.main(flags)
