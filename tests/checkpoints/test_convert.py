"""Conversions keep every bit: whatever the way through the dialects, the same drafter comes back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dspark import load_drafter
from dspark.checkpoints import describe, load_block_drafter, open_checkpoint, save_drafter
from dspark.checkpoints.convert import convert
from dspark.checkpoints.dialects import DrafterModel
from dspark.checkpoints.prompt_format import NOTED
from dspark.drafters.block_model import BlockConfig, BlockModel
from dspark.drafters.eagle3 import Eagle3Drafter
from dspark.drafters.eagle3_model import Eagle3Config, Eagle3Model
from dspark.drafters.gemma4_layer import Gemma4BlockConfig, Gemma4BlockModel
from dspark.engine.engine import Engine
from dspark.errors import CheckpointError, InvalidConfiguration
from dspark.target.target import Target
from dspark.types import SamplingParams
from engine.models import VOCAB_SIZE, random_target

SHAPE: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=VOCAB_SIZE,
    target_layer_ids=(0, 2, 4),
    num_target_layers=8,
    rope_theta=5e5,
)
DSPARK = BlockConfig(
    **SHAPE,
    num_hidden_layers=2,
    block_size=4,
    mask_token_id=1,
    markov_rank=8,
    enable_confidence_head=True,
    confidence_head_with_markov=True,
)
DFLASH = dataclasses.replace(DSPARK, markov_rank=0, enable_confidence_head=False, confidence_head_with_markov=False)
RNN = dataclasses.replace(DSPARK, markov_head_type="rnn")
EAGLE3 = Eagle3Config(**SHAPE, ttt_length=3)
LLAMA = dataclasses.replace(EAGLE3, model_type="llama")
REDUCED = dataclasses.replace(LLAMA, draft_vocab_size=20)
KNOWN = torch.arange(1, VOCAB_SIZE, 3)[:20]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return random_target(tmp_path_factory.mktemp("target"), num_layers=8)


def make(config: BlockConfig | Eagle3Config) -> DrafterModel:
    torch.manual_seed(0)
    model = BlockModel(config) if isinstance(config, BlockConfig) else Eagle3Model(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    if getattr(config, "draft_vocab_size", None):
        model.choose_vocabulary(KNOWN)  # type: ignore[operator]
    return model


def step(source: Path, to: str, target: Target | None) -> Path:
    out = source.with_name(f"{source.name}-{to}")
    convert(open_checkpoint(str(source)), to, out, target)
    return out


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys, or remove those that are set to `...`."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


ROUTES = [
    (DSPARK, ["deepspec", "speculators", "specforge", "dspark"]),
    (DFLASH, ["speculators", "deepspec", "specforge", "speculators", "dspark"]),
    (RNN, ["specforge", "speculators", "deepspec", "dspark"]),
    (EAGLE3, ["deepspec", "speculators", "dspark", "deepspec", "dspark"]),
    (LLAMA, ["speculators", "specforge", "speculators", "dspark"]),
    (REDUCED, ["specforge", "speculators", "dspark", "specforge", "dspark"]),
    (dataclasses.replace(LLAMA, norm_before_residual=True), ["speculators", "dspark"]),
]


@pytest.mark.parametrize(
    ("config", "route"), ROUTES, ids=["dspark", "dflash", "rnn", "eagle3", "llama", "reduced", "residual"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back(config: Any, route: list[str], dtype: torch.dtype, tmp_path: Path, target: Target) -> None:
    saved = make(config)
    save_drafter(saved, tmp_path / "d", dtype)
    folder, before = tmp_path / "d", load_file(tmp_path / "d" / "model.safetensors")
    for to in route:
        folder = step(folder, to, target)
        loaded = load_block_drafter(open_checkpoint(str(folder)), target, dtype)
        for name, tensor in loaded.model.state_dict().items():
            assert torch.equal(tensor, before[name]), (to, name)
        # What EAGLE's layout cannot say: whose the head is, how far training unrolled, how deep the target is.
        known = (
            {"trains_lm_head": False, "ttt_length": 3, "num_target_layers": 8}
            if isinstance(config, Eagle3Config)
            else {}
        )
        assert dataclasses.replace(loaded.model.config, **known) == config, to
        if dtype == target.dtype and config.__class__ is BlockConfig:
            assert loaded.lm_head is target.model.get_output_embeddings()
    after = load_file(folder / "model.safetensors")
    assert after.keys() - {"lm_head.weight"} == before.keys()
    assert all(after[name].dtype == before[name].dtype for name in before)


@pytest.mark.parametrize("config", [DFLASH, REDUCED], ids=["dflash", "reduced"])
def test_a_converted_drafter_drafts_the_same(config: Any, tmp_path: Path, target: Target) -> None:
    save_drafter(make(config), tmp_path / "d", torch.float32)
    prompts, params = [[3, 4, 5], [6, 7]], SamplingParams(temperature=0.0, max_tokens=12)
    rounds = []
    for folder in (tmp_path / "d", step(tmp_path / "d", "speculators", target)):
        engine = Engine(target, load_drafter(str(folder), target), "fixed:7")
        proposed = []
        propose = engine.drafter.propose
        engine.drafter.propose = lambda *a, p=propose, to=proposed: to.append(p(*a)) or to[-1]  # type: ignore[method-assign,misc]
        engine.generate(prompts, params)
        rounds.append([draft.tokens.tolist() for draft in proposed])
    assert rounds[0] == rounds[1]


@pytest.mark.parametrize("to", ["dspark", "deepspec", "speculators", "specforge"])
def test_what_was_noted_of_tokens_and_template_comes_along(to: str, tmp_path: Path, target: Target) -> None:
    noted = {key: f"some {key}" for key in NOTED}
    save_drafter(make(DSPARK), tmp_path / "d", torch.float32, **noted)
    converted = open_checkpoint(str(step(tmp_path / "d", to, target))).config
    assert {key: converted.get(key) for key in NOTED} == noted


def test_what_vllm_expects_of_a_block_drafter(tmp_path: Path, target: Target) -> None:
    """Keys that its loader reads, checked against vLLM 0.32's source."""
    save_drafter(make(DFLASH), tmp_path / "d", torch.float32)
    folder = step(tmp_path / "d", "speculators", target)
    config = json.loads((folder / "config.json").read_text())
    assert config["speculators_model_type"] == "dspark" and config["sample_from_anchor"] is True
    assert config["aux_hidden_state_layer_ids"] == [1, 3, 5]
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4
    assert "name_or_path" in config["speculators_config"]["verifier"]
    backbone = config["transformer_layer_config"]
    assert backbone["model_type"] == "qwen3" and backbone["rope_theta"] == 5e5 and backbone["num_hidden_layers"] == 2
    tensors = load_file(folder / "model.safetensors")
    assert tensors["markov_head.markov_w2.weight"].shape == (VOCAB_SIZE, 1)
    assert not tensors["markov_head.markov_w2.weight"].any()
    assert "embed_tokens.weight" not in tensors and "lm_head.weight" not in tensors


def test_what_vllm_expects_of_eagle3(tmp_path: Path, target: Target) -> None:
    save_drafter(make(REDUCED), tmp_path / "d", torch.float32)
    folder = step(tmp_path / "d", "speculators", target)
    config = json.loads((folder / "config.json").read_text())
    assert config["speculators_model_type"] == "eagle3" and config["transformer_layer_config"]["model_type"] == "llama"
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 3, 5]
    assert config["norm_before_residual"] is False and config["draft_vocab_size"] == 20
    tensors = load_file(folder / "model.safetensors")
    assert torch.equal(tensors["d2t"] + torch.arange(20), KNOWN)
    assert tensors["t2d"].dtype == torch.bool and tensors["t2d"].nonzero().flatten().equal(KNOWN)
    assert torch.equal(tensors["lm_head.weight"], target.model.get_output_embeddings().weight[KNOWN])


def test_eagles_own_release_loads(tmp_path: Path, target: Target) -> None:
    """Its config says LlamaForCausalLM and names no layers; its layer is called midlayer, its head is its own."""
    save_drafter(make(REDUCED), tmp_path / "d", torch.float32)
    folder = step(tmp_path / "d", "specforge", target)
    edit_config(folder, architectures=["LlamaForCausalLM"], eagle_config=..., rope_parameters=..., dtype=...)
    tensors = load_file(folder / "model.safetensors")
    assert any(name.startswith("midlayer.") for name in tensors)
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1}, folder / "model.safetensors")
    drafter = load_drafter(str(folder), target)
    assert isinstance(drafter, Eagle3Drafter) and drafter.feature_layers == (1, 3, 4)
    assert torch.equal(drafter.lm_head.weight, tensors["lm_head.weight"] + 1)
    assert describe(str(folder))["dialect"] == "EAGLE"


def test_copies_are_left_out_and_put_in(tmp_path: Path, target: Target) -> None:
    save_drafter(make(DSPARK), tmp_path / "d", torch.float32)
    whole = step(tmp_path / "d", "deepspec", target)
    tensors = load_file(whole / "model.safetensors")
    assert torch.equal(tensors["embed_tokens.weight"], target.model.get_input_embeddings().weight)
    own = convert(open_checkpoint(str(whole)), "dspark", tmp_path / "own", target)
    assert own.left_out == ["embed_tokens.weight", "lm_head.weight"] and own.added == []
    kept = convert(open_checkpoint(str(whole)), "dspark", tmp_path / "kept")
    assert kept.left_out == [], "without the target nobody knows that they are copies"
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors, whole / "model.safetensors")
    assert convert(open_checkpoint(str(whole)), "dspark", tmp_path / "other", target).left_out == [
        "embed_tokens.weight"
    ]


def test_what_a_dialect_cannot_say_is_refused(tmp_path: Path, target: Target) -> None:
    def refused(config: Any, to: str, message: str, with_target: bool = True) -> None:
        folder = tmp_path / f"{type(config).__name__}-{abs(hash((config, to, with_target)))}"
        model = Gemma4BlockModel(config) if isinstance(config, Gemma4BlockConfig) else make(config)
        save_drafter(model, folder, torch.float32)
        with pytest.raises(CheckpointError, match=message):
            convert(open_checkpoint(str(folder)), to, tmp_path / "out", target if with_target else None)
        assert not (tmp_path / "out").exists()

    refused(DSPARK, "deepspec", "holds copies .* name its target with --target", with_target=False)
    refused(REDUCED, "speculators", "lm_head.weight, and this file has none", with_target=False)
    refused(REDUCED, "deepspec", "the whole vocabulary .* --to speculators")
    refused(EAGLE3, "specforge", "Llama's layer .* --to speculators")
    gemma = Gemma4BlockConfig(
        **{f.name: getattr(DSPARK, f.name) for f in dataclasses.fields(DSPARK)}, partial_rotary_factor=0.5
    )
    refused(gemma, "speculators", "--to deepspec")
    refused(dataclasses.replace(DSPARK, hidden_size=64), "speculators", "64 wide and the target 32")


def test_mistakes_are_named(tmp_path: Path, target: Target) -> None:
    save_drafter(make(REDUCED), tmp_path / "d", torch.float32)
    source = open_checkpoint(str(tmp_path / "d"))
    with pytest.raises(InvalidConfiguration, match="got 'onnx'"):
        convert(source, "onnx", tmp_path / "out")
    with pytest.raises(InvalidConfiguration, match="not empty"):
        convert(source, "dspark", tmp_path / "d")
    tensors = load_file(tmp_path / "d" / "model.safetensors")
    save_file(tensors | {"d2t": tensors["d2t"] + 1}, tmp_path / "d" / "model.safetensors")
    with pytest.raises(CheckpointError, match="d2t and t2d do not describe one vocabulary"):
        load_block_drafter(open_checkpoint(str(tmp_path / "d")), target)
