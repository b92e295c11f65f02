"""What the drafter takes to read, learned from steps on a simulated clock."""

from __future__ import annotations

import pytest

from dspark.budget.capacity import Capacity
from dspark.budget.reading_up import ReadingUp
from dspark.types import Load, StepRecord


class Known(Capacity):
    def draft_seconds(self, requests, context_tokens):
        return 1e-3 * requests


def step(unread: int = 4, prompt_tokens: int = 0, seconds: float | None = None) -> StepRecord:
    """4 requests commit 2 tokens each; reading takes 10 us a position."""
    record = StepRecord([0, 1, 2, 3], accepted=[1] * 4, num_asked=4, num_unread=unread, num_prompt_tokens=prompt_tokens)
    record.load = Load(4 + prompt_tokens, 4, 400, num_prompt_tokens=prompt_tokens)
    record.seconds = {"draft": 4e-3 + 1e-5 * unread if seconds is None else seconds}
    return record


def test_seconds_of_reading_are_those_beyond_a_usual_draft():
    reading = ReadingUp()
    reading.observe(step(), Known())
    assert reading.seconds(1000) == 0 and reading.seconds_per_token == 0
    for unread in (100, 500, 2000):
        reading.observe(step(unread), Known())
    assert reading.seconds(1000) == pytest.approx(0.01)


def test_prompts_are_spread_over_the_tokens_that_follow_them():
    """400 prompt tokens in every hundredth step, half of them known to a prefix cache; 800 committed tokens between them."""
    reading = ReadingUp()
    for i in range(4000):
        record = step(unread=404 if i % 100 == 1 else 4, prompt_tokens=200 if i % 100 == 0 else 0)
        record.num_prefix_found = record.num_prompt_tokens
        reading.observe(record, Known())
    assert reading.seconds_per_token == pytest.approx(0.5e-5, rel=0.2)


def test_what_reading_takes_at_all_is_not_taken_for_what_each_position_takes():
    """Probes read a few positions and pay 2 ms before the first one: a prompt of 400 does not take ten times that."""
    reading = ReadingUp()
    for unread in (70, 90, 150, 80, 300, 75, 500):
        reading.observe(step(unread, seconds=6e-3 + 1e-5 * unread), Known())
    assert reading.seconds(1000) == pytest.approx(0.012)
    for i in range(4000):  # a new request, after a prompt of 400 tokens, for every 800 committed ones
        record = step(prompt_tokens=400 if i % 100 == 0 else 0)
        record.request_ids = [0, 1, 2, 3 + i // 100]
        reading.observe(record, Known())
    assert reading.seconds_per_token == pytest.approx((2e-3 + 400e-5) / 800, rel=0.2)


@pytest.mark.parametrize("seconds", [7200.0, -1.0, 0.0, float("nan")])
def test_a_clock_that_leaps_costs_nobody_anything(seconds):
    reading = ReadingUp()
    reading.observe(step(100, seconds=seconds), Known())
    assert reading.seconds(1000) == 0
