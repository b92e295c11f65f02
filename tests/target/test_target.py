"""What a target refuses, what a failed forward leaves behind, and loading from folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from dspark.errors import CheckpointError, InvalidConfiguration, OutOfSlots, UnsupportedModel
from dspark.target import Target, load_target, native
from dspark.target.check import check_parity
from dspark.types import Span

MakePair = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(make_pair: MakePair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    make_pair("llama").plain.save_pretrained(path)
    return path


def test_out_of_slots_leaves_no_trace(make_pair: MakePair) -> None:
    pair = make_pair("llama", num_slots=12)
    pair.target.extend([Span(1, 0, (5, 6, 7))])
    with pytest.raises(OutOfSlots, match="10 more slots are needed and 9 of 12"):
        pair.target.extend([Span(2, 0, (3,) * 6), Span(1, 3, (8,) * 4)])
    assert pair.target.cache.request_ids == [1]
    assert pair.target.num_free_slots == 9
    pair.target.cache.check()
    found = pair.target.extend([Span(1, 3, (8,), num_logits=1)]).logits
    torch.testing.assert_close(found, pair.logits([5, 6, 7, 8])[-1:], atol=2e-5, rtol=0)


def test_an_interrupted_forward_leaves_no_trace(make_pair: MakePair) -> None:
    target = make_pair("llama").target
    target.extend([Span(1, 0, (5, 6))])

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = target.layers[2].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        target.extend([Span(1, 2, (7,)), Span(2, 0, (7,))], (0, 1))
    hook.remove()
    assert target.cache.request_ids == [1]
    assert target.cache.length(1) == 2
    target.cache.check()
    assert not any(layer._forward_hooks for layer in target.layers)


def test_spans_start_where_the_cache_ends(make_pair: MakePair) -> None:
    target = make_pair("llama").target
    with pytest.raises(AssertionError, match="0 cached tokens"):
        target.extend([Span(1, 1, (5,))])
    with pytest.raises(AssertionError, match="one span per forward"):
        target.extend([Span(1, 0, (5,)), Span(1, 0, (5,))])
    with pytest.raises(InvalidConfiguration, match="layers 0 to 3"):
        target.extend([Span(1, 0, (5,))], (4,))
    assert not target.cache.request_ids


def test_layers_that_share_keys_store_them_once(make_pair: MakePair) -> None:
    target = make_pair("gemma4_text").target
    target.extend([Span(1, 0, (5, 6))])
    assert target.cache.shared == {2: 0, 3: 1}
    assert sorted(target.cache.storage) == [0, 1]


REFUSED = {
    "falcon": dict(new_decoder_architecture=False, multi_query=True, num_kv_heads=1),
    "bloom": dict(n_layer=2, n_head=4),
    "mamba": dict(state_size=4),
    "qwen3_next": dict(
        layer_types=["linear_attention", "full_attention"],
        num_key_value_heads=2,
        head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
}


@pytest.mark.parametrize("family", list(REFUSED))
def test_families_that_cannot_work_are_refused(family: str) -> None:
    shape = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
    config = AutoConfig.for_model(family, **{**shape, **REFUSED[family]})
    model = AutoModelForCausalLM.from_config(config)
    plain = model.config._attn_implementation
    with pytest.raises(UnsupportedModel, match=r"choose"):
        check_parity(Target(model, name=family), plain)


def test_a_state_beside_attention_is_refused_in_low_precision_too() -> None:
    """In Falcon-H1 every layer has both, and logits without the state may differ less than bfloat16 rounds."""
    shape = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
    mamba = dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1)
    config = AutoConfig.for_model("falcon_h1", num_key_value_heads=2, ssm_out_multiplier=0.01, **shape, **mamba)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain = model.config._attn_implementation
    with pytest.raises(UnsupportedModel, match="layers 0, 1 of 2 do not keep all"):
        check_parity(Target(model, name="falcon_h1"), plain)


def test_a_model_that_fails_by_itself_is_no_bare_traceback(make_pair: MakePair) -> None:
    target = make_pair("llama").target
    target.model.lm_head = torch.nn.Linear(7, 97)
    with pytest.raises(UnsupportedModel, match="fails by itself, in plain transformers: RuntimeError"):
        check_parity(target, "eager")


def test_the_check_sees_a_wrong_mask(make_pair: MakePair, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make_pair("llama").target
    check_parity(target, "eager")
    assert not target.cache.request_ids
    from dspark.target.plan import Visibility

    right = Visibility.mask
    monkeypatch.setattr(native, "attend_slots", None)  # it needs no mask, and other tests may have loaded it
    monkeypatch.setattr(Visibility, "mask", lambda self, *rest: right(self, *rest).roll(1, -1))
    with pytest.raises(UnsupportedModel, match="other logits"):
        check_parity(target, "eager")


def test_a_folder_loads_without_a_tokenizer(folder: Path) -> None:
    target = load_target(folder, device="cpu")
    assert (target.dtype, target.vocab_size, target.hidden_size, target.num_layers) == (torch.float32, 97, 32, 4)
    assert target.tokenizer is None
    assert target.end_token_ids == (2,)
    assert target.max_length == 256
    assert not target.cache.request_ids
    assert load_target(folder, dtype="bfloat16", device="cpu").dtype == torch.bfloat16


def test_a_chunked_model_ends_with_its_chunk(make_pair: MakePair) -> None:
    config = make_pair("llama").plain.config
    config.attention_chunk_size = 64
    assert Target(AutoModelForCausalLM.from_config(config)).max_length == 64


def test_unknown_dtype(folder: Path) -> None:
    with pytest.raises(InvalidConfiguration, match="float32, bfloat16, float16"):
        load_target(folder, dtype="int3")


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "~/nowhere-at-all", "a/b/c"])
def test_a_path_that_does_not_exist_never_reaches_the_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_target(name)


def test_folders_that_are_not_models(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_target(tmp_path)
    with pytest.raises(CheckpointError, match="is a file"):
        load_target(folder / "config.json")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="complete folder"):
        load_target(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="could not be loaded"):
        load_target(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(CheckpointError, match="could not be loaded"):
        load_target(tmp_path)


def test_missing_tensors_are_named(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"lacks .*layers\.4\."):
        load_target(tmp_path)


def test_not_a_causal_model(tmp_path: Path) -> None:
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config = AutoConfig.for_model("clip_vision_model", **shape)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(InvalidConfiguration, match="clip_vision_model"):
        load_target(tmp_path)


def test_a_hub_id_without_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="could not be fetched from the hub"):
        load_target("nobody/has-this-model", local_files_only=True)
