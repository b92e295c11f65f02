"""What neighbours tell of drafted and plain steps, however the machine's speed wanders."""

from __future__ import annotations

import numpy as np
import pytest

from dspark.budget.capacity import Capacity
from dspark.budget.side_by_side import SideBySide
from dspark.types import Load, StepRecord

LOAD = Load(8, 8, 800)


class Believed(Capacity):
    """Plain steps are thought to take 5 ms and drafted ones 10 ms, whatever happens."""

    is_known = True

    def seconds(self, tokens, requests, context_tokens, is_reading=False):
        return np.where(np.asarray(tokens) > requests, 8e-3, 5e-3)

    def draft_seconds(self, requests, context_tokens):
        return 2e-3


def step(asked: int, seconds: float, unread: int = 8, prompt_tokens: int = 0) -> StepRecord:
    tokens = 8 + 3 * asked
    load = Load(8, 8, 800, num_prompt_tokens=prompt_tokens)
    record = StepRecord(list(range(8)), load=load, num_asked=asked, num_unread=unread * asked, num_tokens=tokens)
    record.seconds = {"target": seconds}
    return record


def test_the_ratio_of_neighbours_is_found_on_a_wandering_machine():
    """Drafted steps take three times as long as plain ones: half as much again as believed."""
    rng, pairs = np.random.default_rng(0), SideBySide()
    for i in range(600):
        speed = (
            np.exp(np.sin(i / 100))
            * rng.lognormal(0, 0.05)
            * (5 if i % 97 == 0 else 1)
            * (2 if i % 10 in (0, 1, 4) else 1)
        )  # a change costs
        pairs.observe(step(0 if i % 10 < 4 else 8, speed * (5e-3 if i % 10 < 4 else 15e-3)))
    assert pairs.num_pairs(8) == 12
    assert pairs.excess(Believed(), LOAD, 8) == pytest.approx(1.5, rel=0.08)
    assert pairs.num_pairs(32) == 0


def test_what_is_known_of_a_like_number_of_requests_serves_until_more_is():
    pairs = SideBySide()
    for i in range(80):
        pairs.observe(step(0 if i % 8 < 4 else 8, 5e-3 if i % 8 < 4 else 15e-3))
    own, near, far = (pairs.excess(Believed(), Load(n, n, 100 * n), n) for n in (8, 6, 16))
    assert 1.5 >= own > near > far > 1.25
    assert pairs.excess(Believed(), Load(32, 32, 3200), 32) == 1.0


def test_a_share_that_was_never_drafted_for_does_not_look_cheap_beside_one_that_was():
    pairs = SideBySide()
    for i in range(80):
        pairs.observe(step(0 if i % 8 < 4 else 8, 5e-3 if i % 8 < 4 else 15e-3))
    all_of_them, half, one = (pairs.excess(Believed(), LOAD, n) for n in (8, 4, 1))
    assert all_of_them == half == one > 1.2


def test_shares_of_the_requests_are_told_apart():
    pairs = SideBySide()
    for i in range(120):
        asked = (0, 8, 0, 2)[i // 4 % 4]
        pairs.observe(step(asked, {0: 5e-3, 8: 20e-3, 2: 5e-3}[asked]))
    assert pairs.excess(Believed(), LOAD, 8) > 1.8 and pairs.excess(Believed(), LOAD, 2) < 0.6


@pytest.mark.parametrize(
    "other",
    [
        step(8, 15e-3, unread=400),  # reads what piled up
        step(8, 15e-3, prompt_tokens=50),
        step(8, 7200.0),  # the clock leapt
        step(8, -1.0),
    ],
)
def test_steps_that_are_not_alike_are_not_compared(other):
    pairs = SideBySide()
    for _ in range(10):
        for neighbour in (step(0, 5e-3), other):
            for _ in range(4):
                pairs.observe(neighbour)
    assert pairs.num_pairs(8) == 0


def test_prompts_in_between_are_stepped_over():
    """Where requests are short, hardly two steps follow each other without a prompt being read."""
    pairs = SideBySide()
    for i in range(40):
        pairs.observe(step(0 if i % 4 == 0 else 8, 5e-3 if i % 4 == 0 else 15e-3))
        pairs.observe(step(8, 1.0, prompt_tokens=10))
    assert pairs.num_pairs(8) == 12
    assert pairs.excess(Believed(), LOAD, 8) == pytest.approx(1.5, rel=0.08)


def test_what_lies_far_apart_is_not_compared():
    pairs = SideBySide()
    for far in [step(0, 5e-3)] * 2 + [step(8, 1.0, prompt_tokens=10)] * 20 + [step(8, 15e-3)] * 2:
        pairs.observe(far)
    assert pairs.num_pairs(8) == 0


def test_steps_behind_long_prompts_are_compared_with_their_like():
    """Drafts make short steps three times as long, and those that read much anyway half as long again."""
    pairs, seconds = SideBySide(), {(800, 0): 5e-3, (800, 8): 15e-3, (80_000, 0): 10e-3, (80_000, 8): 15e-3}
    for i in range(240):
        context, asked = ((800, 0), (800, 8), (80_000, 0), (80_000, 8))[i // 4 % 4]
        record = step(asked, seconds[context, asked])
        record.load = Load(8, 8, context)
        pairs.observe(record)
    assert pairs.num_pairs(8) == 2 * 12
    short, long = (pairs.excess(Believed(), Load(8, 8, context), 8) for context in (800, 80_000))
    assert short == pytest.approx(1.5, rel=0.08) and long == pytest.approx(0.75, rel=0.08)


def test_plain_steps_count_once_the_caches_have_settled():
    """Of one request, the first plain steps after drafts take a fifth longer than those that plain decoding consists of."""
    pairs, drafted, plain = SideBySide(), step(8, 15e-3), step(0, 5e-3)
    for record in (drafted, plain):
        record.request_ids, record.load = [0], Load(1, 1, 100)
    drafted.num_asked, drafted.num_unread = 1, 2
    for _ in range(10):
        for _ in range(6):
            pairs.observe(drafted)
        for place in range(9):
            plain.seconds = {"target": 6e-3 if place < 5 else 5e-3}
            pairs.observe(plain)
    believed = Believed().draft_seconds(1, 100) + 8e-3
    assert pairs.num_pairs(1) == 12
    assert pairs.excess(Believed(), Load(1, 1, 100), 1) == pytest.approx(15 / 5 / (believed / 5e-3), rel=0.08)
