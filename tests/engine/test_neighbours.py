"""Engines that share a target, and too few slots for all of them."""

from __future__ import annotations

import pytest

from dspark.drafters.ngram import NGramDrafter
from dspark.engine.engine import Engine
from dspark.errors import OutOfSlots
from dspark.types import SamplingParams, Span
from engine.models import random_target


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return random_target(tmp_path_factory.mktemp("target"))


@pytest.fixture
def scarce(target):
    """A target whose slots one long request nearly fills."""
    limit = target.cache.limit
    target.resize(80)
    yield target
    target.resize(limit)


def test_engines_over_one_target_do_not_wait_for_each_other_for_ever(scarce):
    prompts, params = [[3, 1, 4] * 10, [1, 5, 9] * 12], SamplingParams(temperature=1, seed=2, max_tokens=30)
    expected = [Engine(scarce).generate([p], params)[0].token_ids for p in prompts]
    first, second = Engine(scarce, NGramDrafter(), prefix_tokens=64), Engine(scarce, max_num_batched_tokens=8)
    begun = first.stream(prompts[0], params)
    next(begun)
    assert second.generate([prompts[1]], params)[0].token_ids == expected[1]  # the first is not being read
    list(begun)
    assert begun.generation.token_ids == expected[0]
    streams = [e.stream(p, params) for e, p in zip((first, second), prompts, strict=True)]
    while any(s.request.finish_reason is None for s in streams):  # both wait in the same thread
        for stream in streams:
            next(stream, None)
    assert [s.generation.token_ids for s in streams] == expected
    assert scarce.num_free_slots == scarce.cache.limit


def test_engines_that_are_stepped_in_turn_leave_each_other_their_slots(scarce):
    prompts, params = [[3, 1, 4] * 5, [1, 5, 9] * 5], SamplingParams(temperature=1, seed=2, max_tokens=40)
    expected = [Engine(scarce).generate([p], params)[0].token_ids for p in prompts]
    records = []
    engines = [Engine(scarce, NGramDrafter(), observers=[records.append]) for _ in prompts]
    requests = [e.submit(p, params) for e, p in zip(engines, prompts, strict=True)]
    while any(r.finish_reason is None for r in requests):  # slots run out where each engine has one request
        for engine in engines:
            engine.step()
    assert [r.generated for r in requests] == expected
    assert sum(r.num_preempted for r in records) == 1


def test_slots_that_nobody_will_give_back_are_an_error(scarce):
    scarce.extend([Span(-1, 0, [0] * 60)])
    try:
        with pytest.raises(OutOfSlots, match="60 of 80 slots belong to requests of no engine"):
            Engine(scarce).generate([[3, 1, 4] * 10], SamplingParams(max_tokens=5))
    finally:
        scarce.release(-1)
