"""The bytes that a floor counts, by hand; and that shapes are the shapes they are named after."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.floor import Floor, floor_of, seconds_of, weight_bytes
from benchmarks.shapes import SHAPES, build

_PARAMETERS = {"qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360, "llama-3.1-8b": 8_030_261_248}


@pytest.mark.parametrize("shape", _PARAMETERS)
def test_shapes_have_the_published_number_of_parameters(shape):
    config, drafter = SHAPES[shape]()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == _PARAMETERS[shape]
    assert drafter.target_layer_ids[-1] < config.num_hidden_layers - 1
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    read = 2 * (_PARAMETERS[shape] - (0 if shape == "qwen3-4b" else embedding.weight.numel()))
    assert weight_bytes(model, embedding, head) == read


def test_the_floor_of_the_tiny_pair_by_hand():
    target, drafter = build("tiny", torch.device("cpu"), torch.bfloat16)
    floor = floor_of(target, drafter, bytes_per_second=1e9)
    # 14 layers: attention 256 x (256 + 128 + 128 + 256), MLP 3 x 256 x 768, norms 2 x 256 + 2 x 64; head 4096 x 256
    assert floor.target == 2 * (14 * (256 * 768 + 3 * 256 * 768 + 640) + 256 + 4096 * 256)
    # 2 such layers, fc 4 x 256 -> 256, two norms, W2 of rank 96, confidence 256 + 96 + 1, and the target's head
    own = 2 * (256 * 768 + 3 * 256 * 768 + 640) + 4 * 256 * 256 + 512 + 96 * 4096 + 353
    assert floor.drafter == 2 * (own + 4096 * 256)
    assert floor.per_token == 14 * 2 * 2 * 64 * 2 and floor.draft_per_token == floor.per_token // 7
    assert floor.step(1000) == pytest.approx((floor.target + 1000 * floor.per_token) / 1e9)


def test_longer_contexts_and_slower_memory_raise_the_floor():
    floor = Floor(target=100, drafter=20, per_token=2, draft_per_token=1, bytes_per_second=10.0)
    assert (floor.step(0), floor.step(50), floor.draft(10)) == (10.0, 20.0, 3.0)


def test_every_call_is_timed():
    calls = []
    assert len(seconds_of(lambda: calls.append(1), torch.device("cpu"), 4)) == len(calls) == 4
