"""A folder of text and a random little target with a tokenizer of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dspark.train.data import Source
from dspark.train.target_lm import TargetSettings, make_target, save_target, train_tokenizer

MATH, CODE, PLAIN = (
    Source("sums/chat.jsonl", "math", 3),
    Source("words/chat.jsonl", "code", 1),
    Source("a/code.jsonl", "code", 1),
)
SHAPE = dict(
    vocab_size=300,
    tokenizer_characters=4000,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def chat(*turns: str, first: str = "user") -> dict[str, Any]:
    """Turns of two speakers in turn."""
    other = "assistant" if first == "user" else "user"
    roles = [first, other] * len(turns)
    return {"conversations": [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_rows(
        folder / MATH.path, [chat(f"What is {i} + {i}?", f"It is {2 * i}.", "Sure?", "Yes.") for i in range(150)]
    )
    write_rows(folder / CODE.path, [chat(f"Print word number {i}.", f"print('w{i}')") for i in range(100)])
    write_rows(folder / PLAIN.path, [{"text": f"def f{i}(x):\n    return x + {i}\n"} for i in range(100)])
    return folder


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attention scaled up, as in engine.models: else it would be nearly a bigram and hide mistakes."""
    folder = tmp_path_factory.mktemp("target")
    settings = TargetSettings((MATH,), **SHAPE)
    words = ["What is 1 + 2? It is 3.", "Print word number 4.", "Every sentence brings other letters together.\n"]
    tokenizer = train_tokenizer({MATH: words}, settings)
    assert len(tokenizer) == SHAPE["vocab_size"]
    torch.manual_seed(0)
    model = make_target(tokenizer, settings)
    with torch.no_grad():
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.o_proj.weight, std=0.5)
            torch.nn.init.normal_(layer.mlp.down_proj.weight, std=0.02)
            layer.self_attn.v_proj.weight.mul_(8)
        model.model.embed_tokens.weight.mul_(8)
    save_target(model, tokenizer, folder)
    return folder
