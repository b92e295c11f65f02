"""What does not fit is refused before anything is computed, and what a recipe leaves out has a sensible value."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoTokenizer, Gemma4TextConfig, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from dspark.checkpoints.prompt_format import fingerprint, template_fingerprint, tokenizer_fingerprint
from dspark.errors import CheckpointError, InvalidConfiguration
from dspark.train.kinds import find_mask_token, make_config, shape_of, spread_layers
from dspark.train.plan import Plan, make_plan
from dspark.train.texts import Text, TextsInfo, save_texts

PAIR = Path(__file__).parents[2] / "pairs" / "tiny"
DRAFTER = "[drafter]\nnum_hidden_layers = 1\nmask_token_id = 3\nmarkov_rank = 8\n"
TRAIN = "[train]\nsteps = 2\nnum_validation = 2\n"


@pytest.fixture
def data(tmp_path: Path, target_folder: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    save_texts([Text.after_prompt(torch.arange(10, 30), 4) for _ in range(6)], folder / "shard-00000.safetensors")
    info(target_folder).save(folder)
    return folder


def info(target: Path) -> TextsInfo:
    tokenizer = AutoTokenizer.from_pretrained(target)
    prints = (tokenizer_fingerprint(tokenizer), template_fingerprint(tokenizer), fingerprint(None))
    return TextsInfo(str(target), 300, *prints, "prepare", {}, {})


def plan(tmp_path: Path, target: Path, data: Path, drafter: str = DRAFTER, train: str = TRAIN, **flags: Any) -> Plan:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(drafter + train, encoding="utf-8")
    return make_plan([recipe], {"target": target, "data": data, "out": tmp_path / "run"}, flags)


def test_a_recipe_needs_next_to_nothing(tmp_path: Path, target_folder: Path, data: Path) -> None:
    made = plan(tmp_path, target_folder, data, drafter='[drafter]\nkind = "dspark"\n')
    [recipe] = made.recipes
    config = recipe.config
    assert (config.hidden_size, config.vocab_size, config.num_target_layers) == (32, 300, 4)
    assert (config.target_layer_ids, config.mask_token_id, config.block_size) == ((0, 1, 2), 3, 7)
    assert config.markov_rank == 256 and config.enable_confidence_head and config.num_hidden_layers == 2
    assert made.prints["template_sha256"] == info(target_folder).template


def test_flags_override_the_recipe(tmp_path: Path, target_folder: Path, data: Path) -> None:
    assert plan(tmp_path, target_folder, data, steps=7, seed=None).settings.steps == 7


def test_a_drafter_to_go_on_from_that_a_flag_names_wins_over_the_recipes_own_start(
    tmp_path: Path, target_folder: Path, data: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"start_from: .*dspark does not fit the target"):  # not: leave one out
        plan(tmp_path, target_folder, data, DRAFTER, TRAIN + "start_from_target = true\n", start_from=PAIR / "dspark")


@pytest.mark.parametrize(
    ("drafter", "train", "message"),
    [
        (DRAFTER + "hidden_size = 64\n", TRAIN, "does not fit the target: it is 64 wide and the target 32"),
        (DRAFTER + "vocab_size = 301\n", TRAIN, "it is 301 tokens large and the target 300"),
        (DRAFTER + "markov_rnak = 8\n", TRAIN, "unknown key 'markov_rnak'.*did you mean 'markov_rank'"),
        ('[drafter]\nkind = "medusa"\n', TRAIN, "kind must be one of dspark, dflash"),
        ('[drafter]\narchitecture = "Medusa"\n', TRAIN, "architecture must be one of Qwen3DSparkModel"),
        (DRAFTER, TRAIN + 'optimizer = "sgd"\n', "optimizer must be one of muon, adamw"),
        (DRAFTER, TRAIN + 'start_from = "x"\nstart_from_target = true\n', "goes on from all weights"),
        (
            DRAFTER,
            TRAIN + 'start_from_target = "maybe"\n',
            "start_from_target must be one of True, False, where it fits",
        ),
        (DRAFTER, TRAIN.replace("2", "0", 1), "steps must be 1 or more"),
        (DRAFTER, "[trian]\nsteps = 1\n", r"a table \[trian\]"),
        (DRAFTER, "", r"the tables \[drafter\] and \[train\]"),
        ("[drafter", TRAIN, "is not TOML"),
    ],
)
def test_mistakes_are_found_before_anything_is_computed(
    drafter: str,
    train: str,
    message: str,
    tmp_path: Path,
    target_folder: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda self: pytest.fail("a model was made"))
    with pytest.raises(InvalidConfiguration, match=message):
        plan(tmp_path, target_folder, data, drafter, train)


def test_texts_of_another_tokenizer_are_refused_and_of_another_template_named(
    tmp_path: Path, target_folder: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = info(target_folder)
    replace(own, template="other").save(data)
    with caplog.at_level(logging.WARNING):
        plan(tmp_path, target_folder, data)
    assert "rendered with another chat template" in caplog.text
    replace(own, tokenizer="other", target="big").save(data)
    with pytest.raises(InvalidConfiguration, match="made for big, whose tokenizer is not that of"):
        plan(tmp_path, target_folder, data)
    (data / "texts.json").unlink()  # shards that do not say how they were made: the ids tell
    save_texts([Text.after_prompt(torch.arange(290, 310), 4)], data / "shard-00001.safetensors")
    with pytest.raises(InvalidConfiguration, match=r"has the token id 309, and .* knows 300 tokens"):
        plan(tmp_path, target_folder, data)


def test_answers_of_another_target_with_this_tokenizer_are_named(
    tmp_path: Path, target_folder: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    replace(info(target_folder), made_by="regenerate", target=f"elsewhere/{target_folder.name}").save(data)
    plan(tmp_path, target_folder, data)
    assert "answers of" not in caplog.text
    replace(info(target_folder), made_by="regenerate", target="elsewhere/big").save(data)
    plan(tmp_path, target_folder, data)
    assert "has answers of elsewhere/big" in caplog.text


def test_different_system_prompts_are_named(
    tmp_path: Path, target_folder: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (data / "more").mkdir()
    replace(info(target_folder), system_prompt="other").save(data / "more")
    plan(tmp_path, target_folder, data)
    assert "2 different system prompts" in caplog.text


def test_a_warm_start_from_another_targets_drafter_is_refused(tmp_path: Path, target_folder: Path, data: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    for config, message in (
        ({"hidden_size": 64}, "its hidden_size is 64 and the target's 32"),
        ({"hidden_size": 32, "vocab_size": 300, "tokenizer_sha256": "x"}, "trained with another tokenizer"),
    ):
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(CheckpointError, match=message):
            plan(tmp_path, target_folder, data, start_from=str(folder))


def test_what_is_missing_is_asked_for(tmp_path: Path, target_folder: Path, data: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(DRAFTER + TRAIN, encoding="utf-8")
    with pytest.raises(InvalidConfiguration, match="expected data: give --data"):
        make_plan([recipe], {"target": target_folder}, {})
    with pytest.raises(InvalidConfiguration, match="cannot be read"):
        make_plan([tmp_path / "none.toml"], {}, {})


def test_every_family_has_a_shape() -> None:
    llama = shape_of(LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, rope_theta=5e5))
    assert (llama["head_dim"], llama["num_key_value_heads"], llama["rope_theta"]) == (16, 2, 5e5)
    gpt2 = shape_of(GPT2Config(n_embd=48, n_layer=5, n_head=4, vocab_size=99))
    assert (gpt2["hidden_size"], gpt2["intermediate_size"], gpt2["num_target_layers"]) == (48, 192, 5)
    assert make_config({"mask_token_id": 3}, gpt2, None, "here")[1].num_key_value_heads == 4
    layer_types = ["sliding_attention", "full_attention"]
    gemma4 = shape_of(Gemma4TextConfig(head_dim=8, global_head_dim=16, num_hidden_layers=2, layer_types=layer_types))
    assert gemma4["head_dim"] == 16  # its layers differ: the rotation is taken from full attention, too


def test_feature_layers_are_those_of_the_released_drafters() -> None:
    assert spread_layers(36) == [1, 9, 17, 25, 33] and spread_layers(40) == [1, 10, 19, 28, 37]
    for num_layers in range(1, 50):
        layers = spread_layers(num_layers)
        assert layers == sorted(set(layers)) and layers[0] >= -1 and layers[-1] <= max(-1, num_layers - 2)


def test_the_mask_token_is_one_that_no_text_contains(target_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(target_folder)
    assert find_mask_token(tokenizer, 300, "here") == 3
    assert find_mask_token(SimpleNamespace(mask_token_id=None, get_vocab=lambda: {"a": 0, "z": 2}), 3, "here") == 1
    tokenizer.mask_token = None
    assert find_mask_token(tokenizer, 320, "here") == 300  # the first one past the tokenizer
    assert find_mask_token(tokenizer, 300, "here") == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert find_mask_token(tokenizer, 300, "here") == tokenizer.eos_token_id
    with pytest.raises(InvalidConfiguration, match="expected mask_token_id"):
        find_mask_token(None, 300, "here")


def test_the_mask_token_of_a_tokenizer_that_keeps_none_in_reserve() -> None:
    """Those of Llama 2 and of the first Mistral spell in bytes what they do not know, so <unk> is in no text."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "<0x00>": 4}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    assert find_mask_token(tokenizer, 5, "here") == 0
    tokenizer.unk_token = "</s>"
    assert find_mask_token(tokenizer, 5, "here") == 2
