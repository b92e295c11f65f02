"""What a step with drafts is expected to give, against every way to choose from each sample."""

from __future__ import annotations

from itertools import combinations

import pytest

from budget.test_guard import Machine
from dspark.budget.prospects import Prospects
from dspark.budget.side_by_side import SideBySide
from dspark.types import Load


def test_expected_tokens_and_seconds_are_those_of_the_best_choice():
    machine, load = Machine(per_token=0.3, per_draft=0.1), Load(2, 2, 200)
    samples = [[[0.9, 0.5], [0.7, 0.2]], [[0.3, 0.1], [0.8, 0.75]]]
    prospects = Prospects(machine, SideBySide(), load, samples, [0.6, 0.4], share_found=0.5)
    drafting, tokens, seconds = 0.2 + 0.1 * 2, 0.0, 0.0
    for sample, weight in zip(samples, [0.6, 0.4], strict=True):
        chances = [chance for row in sample for chance in row]
        choices = [
            (2 + sum(some), 1.0 + 0.3 * (2 + n) + drafting) for n in range(5) for some in combinations(chances, n)
        ]
        best = max(choices, key=lambda choice: choice[0] / choice[1])
        tokens, seconds = tokens + weight * best[0], seconds + weight * best[1]
    plain = 1.0 + 0.3 * 2
    assert prospects.of([0, 1]) == pytest.approx((0.5 * tokens + 0.5 * 2, 0.5 * seconds + 0.5 * (plain + drafting)))
    assert prospects.plain_rate == pytest.approx(2 / plain)
    assert prospects.promising == [1, 0]  # 2.45 against 1.8
    assert prospects.of([0])[0] < prospects.of([1])[0] < prospects.of([0, 1])[0]
