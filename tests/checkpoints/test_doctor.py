"""Readings of an EAGLE-3 checkpoint: which layers, and what the residual carries."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch

from dspark.checkpoints import open_checkpoint, save_drafter
from dspark.checkpoints.doctor import Reading, describe_reading, examine, remedy
from dspark.drafters.block_model import TraceBatch
from dspark.drafters.eagle3_model import Eagle3Config, Eagle3Model
from dspark.engine.engine import Engine
from dspark.losses import LossWeights
from dspark.target.target import Target
from dspark.types import SamplingParams
from engine.models import VOCAB_SIZE, random_target, reference_features

LAYERS, HIDDEN = (1, 2), 32
CONFIG = Eagle3Config(
    hidden_size=HIDDEN,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=VOCAB_SIZE,
    target_layer_ids=LAYERS,
    num_target_layers=5,
    ttt_length=3,
)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return random_target(tmp_path_factory.mktemp("target"), num_layers=5)


@pytest.fixture(scope="module")
def texts(target: Target) -> list[tuple[list[int], int]]:
    rng = random.Random(0)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(4)] for _ in range(4)]
    written = Engine(target).generate(prompts, SamplingParams(temperature=0.0, max_tokens=24))
    return [(g.prompt_token_ids + g.token_ids, 4) for g in written]


@pytest.fixture(scope="module")
def trained(target: Target, texts: list[tuple[list[int], int]]) -> Eagle3Model:
    """Knows these very texts by heart, from features of LAYERS."""
    torch.manual_seed(0)
    token_ids = torch.tensor([ids for ids, _ in texts])
    states = torch.stack([reference_features(target, ids, (*LAYERS, 4)) for ids, _ in texts])
    anchors = torch.arange(4, token_ids.shape[1] - 1).expand(len(texts), -1)
    mask = (torch.arange(token_ids.shape[1]) >= 4).expand(len(texts), -1)
    features, last = states[..., : 2 * HIDDEN], states[..., 2 * HIDDEN :]
    batch = TraceBatch(token_ids, mask, features, last, anchors, torch.ones_like(anchors).bool())
    model = Eagle3Model(CONFIG)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        embed, head = target.model.get_input_embeddings(), target.model.get_output_embeddings()
        losses = model.loss(batch, embed, head, LossWeights(confidence=0.0))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(
    ("changes", "meant"),
    [
        ({}, Reading(0, True, False)),
        ({"target_layer_ids": (2, 3)}, Reading(-1, True, False)),
        ({"target_layer_ids": (0, 1)}, Reading(1, True, False)),
        ({"norm_before_residual": True}, Reading(0, True, False)),
    ],
)
def test_the_reading_it_was_trained_for_is_found(
    changes: dict[str, object],
    meant: Reading,
    tmp_path: Path,
    target: Target,
    texts: list[tuple[list[int], int]],
    trained: Eagle3Model,
) -> None:
    model = Eagle3Model(dataclasses.replace(CONFIG, **changes))  # type: ignore[arg-type]
    model.load_state_dict(trained.state_dict())
    save_drafter(model, tmp_path / "d", torch.float32)
    diagnosis = examine(open_checkpoint(str(tmp_path / "d")), target, texts)
    assert diagnosis.best.reading == meant
    assert bool(diagnosis.problems) == bool(changes)
    if changes:
        assert remedy(diagnosis.claimed, meant) in diagnosis.problems[0]
    assert target.num_free_slots == target.cache.limit


def test_every_reading_has_its_own_words() -> None:
    readings = [
        Reading(s, a, n) for s in (-1, 0, 1) for a, n in ((True, None), (False, None), (True, True), (True, False))
    ]
    # A plain residual is the usual one, and is only named where nothing else is to be said.
    words = {describe_reading(r) for r in readings}
    assert len(words) == len(readings) - 2
