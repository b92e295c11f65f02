"""Loading is strict: every way in which a folder is not the drafter it should be has its own message."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark.checkpoints import check_fit, describe, load_block_drafter, open_checkpoint, save_drafter
from dspark.drafters.block_model import BlockConfig, BlockModel
from dspark.drafters.gemma4_layer import Gemma4BlockConfig, Gemma4BlockModel
from dspark.errors import CheckpointError
from dspark.target.target import Target
from engine.models import VOCAB_SIZE, random_target

CONFIG = BlockConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=VOCAB_SIZE,
    target_layer_ids=(0, 2),
    block_size=4,
    mask_token_id=1,
    num_target_layers=4,
    markov_rank=8,
    enable_confidence_head=True,
    confidence_head_with_markov=True,
)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return random_target(tmp_path_factory.mktemp("target"), num_layers=4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_drafter(BlockModel(CONFIG), tmp_path / "drafter", torch.float32)
    return tmp_path / "drafter"


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys, or remove those that are set to `...`."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def load(folder: Path | str, target: Target, **options: Any) -> BlockModel:
    return load_block_drafter(open_checkpoint(str(folder)), target, **options).model


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn", "none"])
def test_round_trip(kind: str, tmp_path: Path, target: Target) -> None:
    config = dataclasses.replace(CONFIG, markov_head_type=kind)
    if kind == "none":
        config = dataclasses.replace(
            CONFIG, markov_rank=0, enable_confidence_head=False, confidence_head_with_markov=False
        )
    saved = BlockModel(config)
    save_drafter(saved, tmp_path / "d", torch.float32)
    loaded = load(tmp_path / "d", target)
    assert loaded.config == config
    assert loaded.state_dict().keys() == saved.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, saved.state_dict()[name]), name
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_gemma_round_trip(tmp_path: Path) -> None:
    shape = {f.name: getattr(CONFIG, f.name) for f in dataclasses.fields(CONFIG)}
    config = Gemma4BlockConfig(**shape | {"final_logit_softcapping": 3.0, "rope_theta": 1e6}, partial_rotary_factor=0.5)
    save_drafter(Gemma4BlockModel(config), tmp_path / "d", torch.float32)
    target = random_target(tmp_path / "target", num_layers=4)
    loaded = load(tmp_path / "d", target)
    assert isinstance(loaded, Gemma4BlockModel) and loaded.config == config
    assert (
        "layers.0.layer_scalar" in loaded.state_dict() and "layers.0.self_attn.v_proj.weight" not in loaded.state_dict()
    )
    # What the release has beside the nested values.
    saved = json.loads((tmp_path / "d" / "config.json").read_text())
    edit_config(
        tmp_path / "d",
        rope_parameters=saved["rope_parameters"] | {"rope_theta": None, "rope_type": "default"},
        rope_theta=None,
        head_dim=4,
        num_key_value_heads=4,
    )
    assert load(tmp_path / "d", target).config == config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_the_one_asked_for(dtype: torch.dtype, folder: Path, target: Target) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    assert {p.dtype for p in load(folder, target, dtype=dtype).parameters()} == {dtype}
    assert {p.dtype for p in load(folder, target).parameters()} == {target.dtype}


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_parameters": ..., "rope_theta": 5e5, "rope_scaling": None},
    ],
)
def test_both_spellings_of_rope_theta(spelling: dict[str, Any], folder: Path, target: Target) -> None:
    edit_config(folder, **spelling)
    assert load(folder, target).config.rope_theta == 5e5


def test_a_training_run_gives_its_newest_step(folder: Path, target: Target) -> None:
    run = folder.parent / "run"
    for step in (9, 10):
        save_drafter(BlockModel(dataclasses.replace(CONFIG, mask_token_id=step)), run / f"step_{step}", torch.float32)
    assert load(run, target).config.mask_token_id == 10
    (run / "step_latest").symlink_to("step_9")
    assert load(run, target).config.mask_token_id == 9
    assert load(run / "step_latest", target).config.mask_token_id == 9


def test_sharded_files(folder: Path, target: Target) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    for file, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: "a.safetensors" if i % 2 == 0 else "b.safetensors" for i, name in enumerate(names)}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert all(torch.equal(t, tensors[name]) for name, t in load(folder, target).state_dict().items())
    (folder / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"index names b\.safetensors, which is not there"):
        load(folder, target)


CONFIG_MISTAKES = [
    (dict(target_layer_ids=[0, 3]), "target_layer_ids must lie in -1 .. 2"),
    (dict(target_layer_ids=[0, 3], num_target_layers=0), "wants the output of layer 3"),
    (dict(target_layer_ids=[0, 9], num_target_layers=12), "trained on 12 target layers and this target has 4"),
    (dict(target_layer_ids=[-2, 1]), "target_layer_ids must lie in"),
    (dict(target_layer_ids=[2, 0]), "strictly increasing"),
    (dict(target_layer_ids=[1, 1]), "strictly increasing"),
    (dict(target_layer_ids=[]), "strictly increasing"),
    (dict(target_layer_ids=[0, 1, 2]), r"fc\.weight has shape \[32, 64\], expected \[32, 96\]"),
    (dict(num_target_layers=5), "trained on 5 target layers and this target has 4"),
    (dict(hidden_size=40), "it is 40 wide and the target 32"),
    (dict(vocab_size=70), "its vocabulary has 70 tokens and the target's 61"),
    (dict(mask_token_id=61), "mask token 61 is not among"),
    (dict(markov_head_type="gated"), "markov_head.gate_proj.bias, markov_head.gate_proj.weight are missing"),
    (dict(markov_head_type="magic"), "markov_head_type"),
    (
        dict(enable_confidence_head=False),
        "confidence_head.proj.bias, confidence_head.proj.weight are in the file, but not",
    ),
    (dict(confidence_head_with_markov=False), r"confidence_head.proj.weight has shape \[1, 40\], expected \[1, 32\]"),
    (dict(num_hidden_layers=3), "and 7 more are missing"),
    (dict(block_size=...), "block_size"),
    (dict(block_size="wide"), "block_size in config.json must be a whole number"),
    (dict(hidden_size="wide"), "hidden_size in config.json must be a whole number"),
    (dict(target_layer_ids=5), "wrong type"),
    (dict(hidden_act="gelu"), "expected the activation silu"),
    (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types also has sliding_attention"),
    (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "got 'yarn'"),
    (dict(rope_parameters=..., rope_scaling={"type": "linear"}), "got 'linear'"),
    (dict(architectures=["Gemma4Eagle3Model"]), "another EAGLE layout, which is not supported"),
    (dict(architectures=["DFlashDraftModel"]), "its anchor slot predicts nothing"),
    (dict(architectures=["DSparkDraftModel"]), "Convert it to DeepSpec's layout"),
    (dict(architectures=["BertModel"]), "is no drafter"),
    (dict(architectures=None), "is no drafter"),
]


@pytest.mark.parametrize(("changes", "message"), CONFIG_MISTAKES, ids=lambda x: str(x)[:40])
def test_mistakes_in_the_config(changes: dict[str, Any], message: str, folder: Path, target: Target) -> None:
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(folder, target)


def test_all_mismatches_are_named_at_once(folder: Path, target: Target) -> None:
    edit_config(folder, vocab_size=70, num_target_layers=5)
    with pytest.raises(
        CheckpointError, match=r"70 tokens.*5 target layers.*markov_w1.*Use a drafter trained for this target"
    ):
        load(folder, target)
    assert len(check_fit(str(folder), target)) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.weight"), "norm.weight is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra is in the file, but not"),
        (
            lambda t: t.update({"fc.weight": t["fc.weight"].T.contiguous()}),
            r"fc.weight has shape \[64, 32\], expected \[32, 64\]",
        ),
        (lambda t: t.update({f"model.{name}": t.pop(name) for name in list(t)}), "missing from the file"),
        (
            lambda t: t.update({"lm_head.weight": torch.zeros(9, 32)}),
            r"lm_head.weight has shape \[9, 32\], expected \[61, 32\]",
        ),
    ],
)
def test_mistakes_in_the_tensors(
    change: Callable[[dict[str, torch.Tensor]], object], message: str, folder: Path, target: Target
) -> None:
    edit_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load(folder, target)


def test_unreadable_folders(folder: Path, target: Target) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load(folder / "nowhere" / "else", target)
    (folder / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load(folder, target)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors"):
        load(folder, target)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        load(folder, target)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="must be one JSON object"):
        load(folder, target)


def test_copies_of_the_targets_embedding_are_not_kept(folder: Path, target: Target) -> None:
    own = {
        "embed_tokens.weight": target.model.get_input_embeddings().weight,
        "lm_head.weight": target.model.get_output_embeddings().weight,
    }
    edit_tensors(folder, lambda tensors: tensors.update({name: t.detach().clone() for name, t in own.items()}))
    loaded = load_block_drafter(open_checkpoint(str(folder)), target)
    assert loaded.embed_tokens is target.model.get_input_embeddings()
    assert loaded.lm_head is target.model.get_output_embeddings()
    assert not any(p.shape[0] == VOCAB_SIZE and "markov" not in name for name, p in loaded.model.named_parameters())
    assert check_fit(str(folder), target) == []


def test_an_embedding_of_another_target(folder: Path, target: Target) -> None:
    other = target.model.get_input_embeddings().weight.detach().clone()
    other[7, 3] += 1
    edit_tensors(folder, lambda tensors: tensors.update({"embed_tokens.weight": other}))
    with pytest.raises(
        CheckpointError, match=r"made for another target: its embed_tokens.weight differ.*own_embeddings=True"
    ):
        load(folder, target)
    loaded = load_block_drafter(open_checkpoint(str(folder)), target, own_embeddings=True)
    assert torch.equal(loaded.embed_tokens(torch.tensor([7])), other[7:8])
    assert loaded.lm_head is target.model.get_output_embeddings()


def test_describe(folder: Path, target: Target) -> None:
    facts = describe(str(folder))
    num_parameters = sum(p.numel() for p in BlockModel(CONFIG).parameters())
    assert facts["kind"] == "drafter" and facts["dialect"] == "DeepSpec" and facts["head"] == "vanilla"
    assert facts["parameters"] == num_parameters and facts["bytes_on_disk"] > 4 * num_parameters
    assert facts["feature_layers"] == [0, 2] and facts["block_size"] == 4 and facts["confidence_head"] is True
    facts = describe(target.name)
    assert facts["kind"] == "target" and facts["parameters"] == target.num_parameters and facts["layers"] == 4


# Dialects ------------------------------------------------------------------------------------------------------------


def specforge(folder: Path) -> None:
    keys = (
        "target_layer_ids",
        "mask_token_id",
        "markov_rank",
        "markov_head_type",
        "enable_confidence_head",
        "confidence_head_with_markov",
    )
    config = json.loads((folder / "config.json").read_text())
    edit_config(
        folder,
        **dict.fromkeys(keys, ...),
        dflash_config={key: config[key] for key in keys},
        architectures=["DSparkDraftModel"],
        auto_map={},
    )


def speculators(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    heads = (
        "block_size",
        "mask_token_id",
        "markov_rank",
        "markov_head_type",
        "enable_confidence_head",
        "confidence_head_with_markov",
    )
    written = {key: config[key] for key in heads} | {
        "architectures": ["DSparkSpeculator"],
        "speculators_model_type": "dspark",
        "speculators_version": "0.9.0",
        "aux_hidden_state_layer_ids": [i + 1 for i in config["target_layer_ids"]],
        "draft_vocab_size": VOCAB_SIZE,
        "sample_from_anchor": True,
        "transformer_layer_config": {
            k: v
            for k, v in config.items()
            if k not in (*heads, "target_layer_ids", "num_target_layers", "architectures")
        },
    }
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in (written | changes).items() if value is not ...})
    )


@pytest.mark.parametrize("rewrite", [specforge, speculators])
def test_dialects_mean_the_same_drafter(rewrite: Callable[[Path], None], folder: Path, target: Target) -> None:
    expected = load(folder, target)
    rewrite(folder)
    loaded = load(folder, target)
    assert dataclasses.replace(loaded.config, num_target_layers=4) == expected.config
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), expected.state_dict().values(), strict=True)
    )
    assert (
        describe(str(folder))["dialect"] == {"specforge": "SpecForge", "speculators": "speculators"}[rewrite.__name__]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(sample_from_anchor=...), "sample_from_anchor is absent"),
        (dict(sample_from_anchor=False), "sample_from_anchor is False"),
        (dict(draft_vocab_size=30), "reduced to 30 of 61"),
        (dict(aux_hidden_state_layer_ids=[1, 4]), "wants the output of layer 3"),
        (dict(aux_hidden_state_layer_ids=...), "expected aux_hidden_state_layer_ids"),
        (dict(speculators_model_type="peagle"), "got 'peagle'"),
    ],
)
def test_what_speculators_leaves_open_is_refused(
    changes: dict[str, Any], message: str, folder: Path, target: Target
) -> None:
    speculators(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(folder, target)


# The release ---------------------------------------------------------------------------------------------------------

RELEASE = {
    "architectures": ["Qwen3DSparkModel"],
    "attention_bias": False,
    "block_size": 7,
    "confidence_head_with_markov": True,
    "dtype": "bfloat16",
    "enable_confidence_head": True,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "layer_types": ["full_attention"] * 5,
    "markov_head_type": "vanilla",
    "markov_rank": 256,
    "mask_token_id": 151669,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_anchors": 512,
    "num_attention_heads": 32,
    "num_hidden_layers": 5,
    "num_key_value_heads": 8,
    "num_target_layers": 36,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "target_layer_ids": [1, 9, 17, 25, 33],
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}


def test_release_shapes() -> None:
    """Names and shapes of dspark_qwen3_4b_block7, written down from its description, on no storage at all."""
    with torch.device("meta"):
        model = BlockModel(BlockConfig.from_dict(RELEASE))
    expected = {"fc.weight": (2560, 12800), "hidden_norm.weight": (2560,), "norm.weight": (2560,)}
    for i in range(5):
        expected |= {
            f"layers.{i}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (2560,),
                "post_attention_layernorm": (2560,),
                "self_attn.q_norm": (128,),
                "self_attn.k_norm": (128,),
                "self_attn.q_proj": (4096, 2560),
                "self_attn.k_proj": (1024, 2560),
                "self_attn.v_proj": (1024, 2560),
                "self_attn.o_proj": (2560, 4096),
                "mlp.gate_proj": (9728, 2560),
                "mlp.up_proj": (9728, 2560),
                "mlp.down_proj": (2560, 9728),
            }.items()
        }
    expected |= {"markov_head.markov_w1.weight": (151936, 256), "markov_head.markov_w2.weight": (151936, 256)}
    expected |= {"confidence_head.proj.weight": (1, 2816), "confidence_head.proj.bias": (1,)}
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == expected
    copies = 2 * 151936 * 2560
    assert len(expected) + 2 == 64  # with embed_tokens and lm_head
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(615e6, rel=1e-3)
    assert sum(p.numel() for p in model.parameters()) + copies == pytest.approx(1.393e9, rel=1e-3)
