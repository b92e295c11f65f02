"""What is said after a run about how well it was scheduled."""

from __future__ import annotations

import pytest

from dspark.budget.capacity import Capacity
from dspark.budget.hindsight import Hindsight, rates
from dspark.types import Load, StepRecord


class Linear(Capacity):
    is_known = True

    def seconds_of(self, tokens, requests, context_tokens, is_reading=False):
        return 1.0 + 0.1 * tokens

    def draft_seconds(self, requests, context_tokens):
        return 0.5 if requests else 0.0


def step(verified, accepted, asked=2, **more) -> StepRecord:
    num_tokens = 2 + sum(verified)
    record = StepRecord(
        request_ids=[1, 2],
        verified=verified,
        accepted=accepted,
        load=Load(2, 2),
        num_tokens=num_tokens,
        num_asked=asked,
        predicted_accepted=3.0,
        predicted_seconds=1.0 + 0.1 * num_tokens,
        seconds={"target": 1.2 + 0.1 * num_tokens, "schedule": 0.1, "draft": 0.5},
        **more,
    )
    record.rate, record.best_rate = rates(Linear(), record)
    return record


def test_regret_is_what_perfect_knowledge_would_have_saved():
    summary = Hindsight()
    summary(step([4, 4], [4, 4]))
    assert summary.regret == 0 and summary.as_json()["wasted"] == 0
    summary = Hindsight()
    summary(step([4, 4], [2, 1]))  # 2.5 s; the 3 accepted alone would have cost 2.0 s, plain steps 1.2 s · 5 / 2
    assert summary.regret == pytest.approx(1 - 2.0 / 2.5)
    summary = Hindsight()
    summary(step([4, 4], [0, 0]))  # nothing accepted: a plain step, 1.2 s, would have done
    assert summary.regret == pytest.approx(1 - 1.2 / 2.5)


def test_rates_are_of_what_was_chosen_and_of_the_best_choice():
    record = step([4, 4], [2, 1])
    assert (record.rate, record.best_rate) == (pytest.approx(5 / 2.5), pytest.approx(5 / 2.0))
    assert rates(Linear(), StepRecord()) == (0.0, 0.0)
    assert rates(Capacity(), record) == (0.0, 0.0)  # nothing has been measured


def test_steps_one_by_one():
    summary = Hindsight(per_step=True)
    summary(step([4, 4], [2, 1]))
    (only,) = summary.as_json()["steps"]
    assert (only["budget"], only["accepted"], only["wasted"], only["tokens_per_second"]) == (8, 3, 5, 2.0)
    assert "steps" not in Hindsight().as_json()


def test_promises_and_what_came_of_them():
    summary = Hindsight()
    summary(step([4, 4], [2, 1]))
    summary(step([0, 0], [0, 0], asked=0, num_skipped=2, skip_reason="cost", num_faults=1))
    summary(StepRecord())  # nobody was decoding
    found = summary.as_json()
    assert (found["num_steps"], found["verified"], found["accepted"], found["predicted_accepted"]) == (2, 8, 3, 6.0)
    assert found["seconds"] - found["predicted_seconds"] == pytest.approx(2 * 0.3)
    assert found["skipped_drafts"] == {"cost": 2} and found["faults"] == 1
    for part in ("4.0 draft tokens verified per step", "3 accepted (6 expected)", "2 (cost)", "1 lost", "regret"):
        assert part in summary.line()
