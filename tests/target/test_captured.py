"""Replayed steps give what eager ones give, whatever is padded, and know only memory that stays where it is.

The recorder is a tape of operations, which like a CUDA graph repeats them on the same memory.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dspark.target import Target
from dspark.target.captured import GraphRecorder, Limits
from dspark.types import Span
from target.tape import TapeRecorder

MakePair = Callable[..., Any]
LAYERS = (2, -1, 0)


def captured(pair: Any, limits: Limits | None = None) -> TapeRecorder:
    """Let the pair's target replay its short forwards."""
    tape, target = TapeRecorder(), pair.target
    target.capture(tape, LAYERS)
    if limits is not None:
        target._compiled[LAYERS].limits = limits
    return tape


def random_spans(target: Any, rng: random.Random, vocabulary: int = 97) -> list[Span]:
    """Of some requests: single tokens, chains, trees, now and then a prompt that is too long to be recorded."""
    spans = []
    for request in rng.sample(range(9), rng.choice((1, 1, 2, 3, 6, 9))):
        start, size = target.cache.length(request), rng.choice((1, 1, 2, 5, 8, 13, 16, 20))
        tokens = [rng.randrange(3, vocabulary) for _ in range(size)]
        parents = [-1, *(rng.randrange(-1, i) for i in range(1, size))] if rng.random() < 0.4 and size <= 16 else None
        spans.append(Span(request, start, tokens, parents, num_logits=rng.randint(0, size)))
    return spans


def assert_equal_steps(ours: Any, plain: Any, atol: float) -> None:
    """Many requests come, grow, lose tokens and go; every step of both targets gives the same."""
    rng = random.Random(0)
    for _ in range(25):
        spans = random_spans(ours.target, rng)
        for pair in (ours, plain):
            pair.poison_unused_slots()
        found, expected = ours.target.extend(spans, LAYERS), plain.target.extend(spans, LAYERS)
        torch.testing.assert_close(found.logits, expected.logits, atol=atol, rtol=0)
        torch.testing.assert_close(found.features, expected.features, atol=5 * atol, rtol=0)
        for span in spans:
            is_done = span.start > 90
            chosen = () if is_done else range(rng.randint(1, len(span.tokens)))
            for pair in (ours, plain):
                pair.target.keep(span.request_id, 0 if is_done else span.start, chosen)
        ours.target.cache.check()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma4_text", "mixtral"])
def test_replayed_equals_eager(make_pair: MakePair, family: str) -> None:
    ours, plain = make_pair(family, num_slots=1200), make_pair(family, num_slots=1200)
    tape = captured(ours, Limits(most_tokens=64, least_context=16))
    assert_equal_steps(ours, plain, atol=2e-5)
    assert tape.num_replays > tape.num_recordings > 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma4_text"])
def test_cuda_graphs_equal_eager(make_pair: MakePair, family: str, caplog: pytest.LogCaptureFixture) -> None:
    ours, plain = make_pair(family), make_pair(family)
    for pair in (ours, plain):
        pair.target = Target(pair.plain.to("cuda"), name=family)
        pair.target.resize(1200)
    record = GraphRecorder(ours.target.device)
    ours.target.capture(record, LAYERS)
    with caplog.at_level(logging.WARNING, "dspark.target.captured"):
        assert_equal_steps(ours, plain, atol=1e-3)
    assert not caplog.records and record.num_bytes > 0


def chain(target: Any, request: int, *tokens: int) -> Tensor:
    """Append tokens to a request; logits of all of them."""
    start = target.cache.length(request)
    return target.extend([Span(request, start, tokens, num_logits=len(tokens))], LAYERS).logits


def test_what_a_step_gave_outlasts_the_next(make_pair: MakePair) -> None:
    pair = make_pair("llama")
    tape = captured(pair)
    chain(pair.target, 1, 5, 6)
    first = pair.target.extend([Span(1, 2, (7, 8), num_logits=2)], LAYERS)
    kept = first.logits.clone(), first.features.clone()
    chain(pair.target, 1, 9, 10)
    assert (tape.num_recordings, tape.num_replays) == (1, 3)
    assert torch.equal(first.logits, kept[0]) and torch.equal(first.features, kept[1])


def test_recordings_follow_the_cache_when_it_moves(make_pair: MakePair) -> None:
    pair = make_pair("llama", num_slots=3000)
    tape, target = captured(pair), pair.target
    chain(target, 1, 5, 6)
    target.cache.reserve(2, 1500)  # it grows
    torch.testing.assert_close(chain(target, 1, 7, 8), pair.logits([5, 6, 7, 8])[2:], atol=2e-5, rtol=0)
    assert tape.num_recordings == 2
    for request in (1, 2):
        target.release(request)
    target.resize(50)
    torch.testing.assert_close(chain(target, 1, 5, 6), pair.logits([5, 6]), atol=2e-5, rtol=0)
    assert tape.num_recordings == 3


def test_the_recording_used_longest_ago_goes(make_pair: MakePair) -> None:
    pair = make_pair("llama")
    tape, target = captured(pair, Limits(most_steps=2)), pair.target
    for tokens, num_recordings in ((2, 1), (4, 2), (2, 2), (8, 3), (2, 3), (4, 4)):
        chain(target, 1, *range(3, 3 + tokens))
        assert tape.num_recordings == num_recordings


def test_what_cannot_be_recorded_runs_eagerly(make_pair: MakePair, caplog: pytest.LogCaptureFixture) -> None:
    pair = make_pair("llama")
    tape = captured(pair)

    def wait(_module: Any, _arguments: Any, output: Any) -> None:
        assert float(output[0].sum()) == float(output[0].sum())

    pair.target.layers[1].register_forward_hook(wait)
    texts = [[5, 6], [7, 8], [9, 10, 11]]
    with caplog.at_level(logging.WARNING):
        found = [chain(pair.target, 1, *text) for text in texts]
    torch.testing.assert_close(torch.cat(found), pair.logits([5, 6, 7, 8, 9, 10, 11]), atol=2e-5, rtol=0)
    assert tape.num_replays == 0
    sizes = ["tokens=2, requests=1, queries=2", "tokens=4, requests=1, queries=4"]
    assert len(caplog.records) == 2
    for record, size in zip(caplog.records, sizes, strict=True):
        assert f"Size({size}, context=256) runs unrecorded: aten" in record.message


def test_one_line_tells_what_recordings_hold(make_pair: MakePair, caplog: pytest.LogCaptureFixture) -> None:
    pair = make_pair("llama")
    captured(pair)
    with caplog.at_level(logging.INFO, "dspark.target.captured"):
        for _ in range(2):
            chain(pair.target, 1, 5, 6)
    size = "Size(tokens=2, requests=1, queries=2, context=256)"
    assert [record.message for record in caplog.records] == [f"recorded {size}: 1 steps (at most 64), 0 MB"]
