"""Models of real shapes with random weights, made where they run: nothing is downloaded, and what they write is no text."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dspark.drafters.block import BlockDrafter
from dspark.drafters.block_model import BlockConfig, BlockModel
from dspark.target.loading import embedded_pair_folder
from dspark.target.target import Target

_HEADS: dict[str, Any] = dict(num_attention_heads=32, num_key_value_heads=8, head_dim=128)


def _qwen3(hidden_size: int, intermediate_size: int, tied: bool) -> tuple[Any, BlockConfig]:
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=151936,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=36,
        tie_word_embeddings=tied,
        max_position_embeddings=40960,
        rope_theta=1_000_000.0,
        **_HEADS,
    )
    return config, drafter_of(config, (1, 9, 17, 25, 33), mask_token_id=151669)


def _llama() -> tuple[Any, BlockConfig]:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        tie_word_embeddings=False,
        max_position_embeddings=131072,
        rope_theta=500_000.0,
        **_HEADS,
    )
    return config, drafter_of(config, (1, 8, 15, 22, 29), mask_token_id=128255)


def _tiny() -> tuple[Any, BlockConfig]:
    folder = embedded_pair_folder("tiny")
    drafter = json.loads((folder / "dspark" / "config.json").read_text(encoding="utf-8"))
    return AutoConfig.from_pretrained(folder / "target"), BlockConfig.from_dict(drafter)


SHAPES: dict[str, Callable[[], tuple[Any, BlockConfig]]] = {
    "tiny": _tiny,
    "qwen3-4b": lambda: _qwen3(2560, 9728, tied=True),
    "qwen3-8b": lambda: _qwen3(4096, 12288, tied=False),
    "llama-3.1-8b": _llama,
}


def drafter_of(config: Any, layers: tuple[int, ...], mask_token_id: int) -> BlockConfig:
    """A DSpark drafter as the released ones are: five layers of the target's geometry, blocks of 7, Markov rank 256."""
    same = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    return BlockConfig(
        **{name: getattr(config, name) for name in same},
        num_hidden_layers=5,
        target_layer_ids=layers,
        block_size=7,
        mask_token_id=mask_token_id,
        num_target_layers=config.num_hidden_layers,
        markov_rank=256,
        enable_confidence_head=True,
        confidence_head_with_markov=True,
    )


def build(shape: str, device: torch.device, dtype: torch.dtype) -> tuple[Target, BlockDrafter]:
    """The target and its drafter, random but the same each time on one kind of device."""
    config, drafter_config = SHAPES[shape]()
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
        drafter = BlockModel(drafter_config).to(dtype).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None  # nobody stops early
    model.generation_config.pad_token_id = 0
    target = Target(model, name=shape)
    return target, BlockDrafter(drafter, model.get_input_embeddings(), model.get_output_embeddings())
