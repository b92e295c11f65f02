"""A scheduler is asked as often as its answers are worth their time; in between a fixed length does."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch

from dspark.budget.sparing import Sparing
from dspark.budget.throughput import Lagged, Optimal
from dspark.types import Draft, Load, StepRecord

SURE, UNSURE = [0.99] * 4, [0.3, 0.09, 0.03, 0.01]


class Cost:
    """Seconds of a step: one, and so much for each token it reads."""

    def __init__(self, per_token: float) -> None:
        self.per_token = per_token

    def seconds(self, tokens, requests, context_tokens, is_reading=False):
        return 1 + self.per_token * np.asarray(tokens, dtype=float)


def run(sparing: Sparing, seconds: float, drafts: list[list[float]], steps: int = 300) -> list[int | None]:
    """What each step verified where a choice was spared; None where it was made, which takes so many seconds."""
    random, verified = Random(1), list[int | None]()
    for _ in range(steps):
        survival = torch.tensor([random.choice(drafts)])
        draft = Draft(torch.zeros(1, 4, dtype=torch.long), torch.tensor([4]))
        load = Load(1, 1, 100)
        is_spared = sparing.can_spare(draft)
        keep = sparing.choose(draft, torch.zeros(0, 0) if is_spared else survival, load)
        taken = {"target": 1.0, "schedule": 0.01 if is_spared else 0.01 + seconds}
        record = StepRecord([0], [4], [int(keep.sum())], [0], survival=None if is_spared else survival, seconds=taken)
        sparing.observe(record)
        verified.append(int(keep.sum()) if is_spared else None)
    return verified


def spared(verified: list[int | None]) -> list[int]:
    return [n for n in verified if n is not None]


def test_a_choice_that_takes_nothing_is_always_made():
    assert not spared(run(Sparing(Optimal(Cost(0.1)), Cost(0.1)), 0.0, [SURE, UNSURE]))


@pytest.mark.parametrize(("drafts", "length"), [(SURE, 4), (UNSURE, 0)])
def test_where_every_choice_is_the_same_hardly_any_is_made(drafts, length):
    verified = run(Sparing(Optimal(Cost(1.0)), Cost(1.0)), 0.2, [drafts])
    assert len(spared(verified)) > 240 and set(spared(verified)) == {length}


def test_choices_that_save_more_than_they_take_are_made():
    """Half of the drafts are to be verified, half are not, and the target is dear: no fixed length comes near."""
    drafts = [SURE, [0.01, 0.0001, 0.0, 0.0]]
    assert not spared(run(Sparing(Optimal(Cost(1.0)), Cost(1.0)), 0.05, drafts))
    assert len(spared(run(Sparing(Optimal(Cost(1.0)), Cost(1.0)), 1.0, drafts))) > 200


def test_it_follows_traffic_that_changes():
    sparing = Sparing(Optimal(Cost(0.2)), Cost(0.2))
    before, after = run(sparing, 0.2, [SURE]), run(sparing, 0.2, [UNSURE], 600)
    assert spared(before)[-1] == 4 and spared(after)[-1] <= 1


def test_trees_are_always_chosen_from():
    sparing = Sparing(Optimal(Cost(0.01)), Cost(0.01))
    assert spared(run(sparing, 0.2, [SURE]))
    tree = Draft(torch.zeros(1, 2, dtype=torch.long), torch.tensor([2]), parents=torch.tensor([[-1, -1]]))
    assert not any(sparing.can_spare(tree) for _ in range(50))


def test_it_looks_ahead_as_far_as_the_scheduler_does():
    assert Sparing(Optimal(Cost(1.0)), Cost(1.0)).anticipates and not Sparing(Lagged(Cost(1.0)), Cost(1.0)).anticipates
