"""Recipes: those that are shipped can be read, and a typing error is never taken silently."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from dspark.errors import InvalidConfiguration
from dspark.losses import LossWeights
from dspark.train.draft_lm import DraftSettings
from dspark.train.kinds import make_config
from dspark.train.regenerate import RegenerateSettings
from dspark.train.settings import from_table, read_recipe, read_toml
from dspark.train.student import TrainSettings
from dspark.train.target_lm import TargetSettings

RECIPES = Path(__file__).parents[2] / "recipes" / "tiny"
TABLES = {
    "target": TargetSettings,
    "regenerate": RegenerateSettings,
    "train": TrainSettings,
    "loss": LossWeights,
    "draft": DraftSettings,
}


def test_all_shipped_recipes_can_be_read() -> None:
    paths = list(RECIPES.glob("*.toml"))
    assert len(paths) > 10
    for path in paths:
        tables = TABLES.keys() & read_toml(path).keys()
        assert tables, path
        for table in tables:
            assert isinstance(read_recipe(path, table, TABLES[table]), TABLES[table])


def test_so_can_those_of_drafters_in_other_folders() -> None:
    shape = dict(hidden_size=256, intermediate_size=768, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    shape |= dict(vocab_size=4096, num_target_layers=8)
    tokenizer = SimpleNamespace(mask_token_id=3)
    paths = [RECIPES.parent / "quick.toml", *(RECIPES.parent / "compare").glob("*.toml")]
    assert len(paths) > 7
    for path in paths:
        table = read_toml(path)
        assert set(table) <= {"drafter", "loss", "train"}
        config = make_config(table["drafter"], shape, tokenizer, str(path))[1]
        assert config.num_hidden_layers == table["drafter"].get("num_hidden_layers", 1)
        assert from_table(table["train"], TrainSettings, str(path)).steps > 0
        from_table(table.get("loss", {}), LossWeights, str(path))


def test_dspark_and_dflash_differ_in_their_heads_only() -> None:
    dspark, dflash = (read_toml(RECIPES / f"{name}.toml") for name in ("dspark", "dflash"))
    shape = dict(hidden_size=256, intermediate_size=768, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    shape |= dict(vocab_size=4096, num_target_layers=8)
    configs = [vars(make_config(table.pop("drafter"), shape, None, "here")[1]) for table in (dspark, dflash)]
    assert dspark == dflash
    heads = {"markov_rank", "enable_confidence_head", "confidence_head_with_markov"}
    assert {key for key, value in configs[0].items() if configs[1][key] != value} == heads


def test_drafters_are_prompted_with_the_targets_own_chat_sources() -> None:
    asked = read_recipe(RECIPES / "text.toml", "regenerate", RegenerateSettings).sources
    learned = read_recipe(RECIPES / "target.toml", "target", TargetSettings).sources
    assert set(asked) == {source for source in learned if source.path.endswith("chat.jsonl")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[train]\nsteps = 1\nlr_matrix = 1",
            r"unknown key 'lr_matrix' in .*a.toml \[train\]: did you mean 'lr_matrices'\?",
        ),
        ("[train]\nsteps = 1\nzzz = 1", "unknown key 'zzz'.*known keys: steps, tokens_per_batch"),
        ("[train]\n", "steps"),
        ("[trian]\nsteps = 1", r"expected a table \[train\] in .*a.toml; it has trian"),
    ],
)
def test_mistakes_in_a_recipe(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(text, encoding="utf-8")
    with pytest.raises(InvalidConfiguration, match=message):
        read_recipe(tmp_path / "a.toml", "train", TrainSettings)


def test_a_mistake_in_a_source_is_named_too(tmp_path: Path) -> None:
    text = '[[sources]]\npath = "a"\ndomian = "math"\nshare = 1\n[regenerate]\n'
    (tmp_path / "a.toml").write_text(text, encoding="utf-8")
    with pytest.raises(InvalidConfiguration, match=r"\[\[sources\]\]: did you mean 'domain'\?"):
        read_recipe(tmp_path / "a.toml", "regenerate", RegenerateSettings)


def test_flags_override_and_none_does_not(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[train]\nsteps = 7", encoding="utf-8")
    assert read_recipe(tmp_path / "a.toml", "train", TrainSettings, {"steps": 3}).steps == 3
    assert read_recipe(tmp_path / "a.toml", "train", TrainSettings, {"steps": None}).steps == 7
