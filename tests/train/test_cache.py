"""Traces on disk are the traces made online; what is damaged is made again, what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dspark.errors import InvalidConfiguration
from dspark.train import cache
from dspark.train.cache import TraceCache, cache_size
from dspark.train.run_log import Table
from dspark.train.texts import Text, pad, save_texts
from dspark.train.traces import TargetStates
from train.processes import make_trainer
from train.test_trainer import write_recipe

CPU = torch.device("cpu")


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[Text]:
    monkeypatch.setattr(cache, "_TOKENS_PER_SHARD", 40)
    generator = torch.Generator().manual_seed(0)
    return [Text.after_prompt(torch.randint(4, 300, (n,), generator=generator), 2) for n in (30, 9, 12, 25, 38, 50, 6)]


@pytest.fixture(scope="module")
def states(target_folder: Path) -> TargetStates:
    return TargetStates(AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32).eval(), (-1, 2))


def nothing(line: str) -> None:
    pass


def test_traces_from_disk_are_those_made_online(texts: list[Text], states: TargetStates, tmp_path: Path) -> None:
    kept = TraceCache(tmp_path, texts, "tiny", states.layer_ids)
    lines: list[str] = []
    kept.fill(states, CPU, lines.append)
    assert len(list(tmp_path.glob("*.safetensors"))) == 5
    size = cache_size(texts, 64, 32, torch.float32)
    assert (size.num_tokens, size.bytes_per_token) == (170, 96 * 4)
    stored = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert size.num_bytes <= stored < size.num_bytes + 5 * 300 and "65.3 kB" in lines[0]
    chosen = [texts[i] for i in (6, 0, 4)]
    token_ids, _ = pad(chosen)
    for ours, online in zip(kept(chosen, token_ids), states(token_ids), strict=True):
        for row, text in enumerate(chosen):
            torch.testing.assert_close(ours[row, : len(text)], online[row, : len(text)], atol=1e-5, rtol=1e-4)
            assert not ours[row, len(text) :].any()


def test_a_run_that_stopped_goes_on_and_damage_is_found(
    texts: list[Text],
    states: TargetStates,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made: list[str] = []
    write = TraceCache._write

    def counted(self: TraceCache, path: Path, *rest: Any) -> str:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(path.name)
        return write(self, path, *rest)

    monkeypatch.setattr(TraceCache, "_write", counted)
    with pytest.raises(KeyboardInterrupt):
        TraceCache(tmp_path, texts, "tiny", states.layer_ids).fill(states, CPU, nothing)
    assert len(made) == 3 and len(json.loads((tmp_path / "traces.json").read_text())["sha256"]) == 3
    content = bytearray((tmp_path / made[1]).read_bytes())
    content[-1] ^= 1
    (tmp_path / made[1]).write_bytes(content)
    damaged = made[1]
    made.clear()
    TraceCache(tmp_path, texts, "tiny", states.layer_ids).fill(states, CPU, nothing)
    assert made == [damaged, "traces-00003.safetensors", "traces-00004.safetensors"]
    assert f"{damaged} is damaged or missing" in caplog.text


def test_what_does_not_fit_is_refused_before_it_starts(
    texts: list[Text], states: TargetStates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 0, 66_000))
    kept = TraceCache(tmp_path, texts, "tiny", states.layer_ids)
    with pytest.raises(InvalidConfiguration, match=r"traces need 68\.5 kB more in .*, and 66 kB are free"):
        kept.fill(states, CPU, nothing)
    assert not list(tmp_path.glob("*.safetensors"))


def test_traces_of_something_else_are_refused(texts: list[Text], states: TargetStates, tmp_path: Path) -> None:
    TraceCache(tmp_path, texts[:1], "tiny", states.layer_ids).fill(states, CPU, nothing)
    for other in (TraceCache(tmp_path, texts[1:2], "tiny", (-1, 2)), TraceCache(tmp_path, texts[:1], "big", (-1, 2))):
        with pytest.raises(InvalidConfiguration, match="another target, other texts or other layers"):
            other.fill(states, CPU, nothing)


def test_training_from_traces_is_training_online(target_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    rows = [Text.after_prompt(torch.tensor([7, 8, *(10 + (i + j) % 12 for j in range(20))]), 2) for i in range(12)]
    save_texts(rows, folder / "shard-00000.safetensors")
    recipe = write_recipe(tmp_path / "dspark.toml")
    for name, where in (("online", None), ("kept", tmp_path / "traces"), ("again", tmp_path / "traces")):
        trainer = make_trainer(
            target_folder, folder, tmp_path / name, [recipe], cache=where, steps=3, validation_prompts=0
        )
        if name == "again":
            trainer.online.decoder = None  # nothing may be computed any more
        trainer.run()
    ends = [Table(tmp_path / name / "dspark" / "validation.csv").rows()[-1] for name in ("online", "kept", "again")]
    assert ends[0]["total"] == pytest.approx(ends[1]["total"], rel=1e-3)
    assert {**ends[1], "seconds": 0} == {**ends[2], "seconds": 0}
