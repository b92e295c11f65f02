"""Schedulers are pure functions: every choice is closed under ancestors and never reaches into padding."""

from __future__ import annotations

import pytest
import torch

from dspark.budget.capacity import Capacity
from dspark.budget.prefix_scheduler import falling_survival, survival_of
from dspark.budget.raw_beliefs import RawBeliefs
from dspark.budget.schedulers import make_scheduler
from dspark.types import Draft, Load, StepRecord

CHAIN = Draft(
    torch.zeros(2, 4, dtype=torch.long),
    torch.tensor([4, 2]),
    torch.tensor([[0.9, 0.5, 0.9, 0.9], [0.8, 0.8, 0.1, 0.1]]),
)
#        0 -> 1 -> 3
#         \-> 2 -> 4
TREE = Draft(
    torch.zeros(1, 5, dtype=torch.long),
    torch.tensor([5]),
    torch.tensor([[0.9, 0.5, 0.9, 0.9, 0.9]]),
    torch.tensor([[-1, 0, 0, 1, 2]]),
)


def kept(name: str, draft: Draft) -> list[list[bool]]:
    survival = RawBeliefs().survival(draft, ())
    return make_scheduler(name, Capacity(), True).choose(draft, survival, Load(len(draft.sizes))).tolist()


def test_fixed_length():
    assert kept("fixed:3", CHAIN) == [[True, True, True, False], [True, True, False, False]]
    assert kept("fixed:0", CHAIN) == [[False] * 4] * 2
    assert kept("fixed:2", TREE) == [[True, True, True, False, False]]


def test_threshold_stops_at_the_first_doubt():
    assert kept("threshold:0.6", CHAIN) == [[True, False, False, False], [True, True, False, False]]
    assert kept("threshold:0.8", CHAIN) == [[True, False, False, False], [True, True, False, False]]
    assert kept("threshold:0.6", TREE) == [[True, False, True, False, True]]
    assert kept("threshold:0", CHAIN) == CHAIN.real.tolist()


def test_threshold_of_running_acceptance():
    """Without confidences the threshold is about how earlier drafts fared: here the second token was always refused."""
    beliefs = RawBeliefs()
    draft = Draft(CHAIN.tokens, CHAIN.sizes)
    scheduler = make_scheduler("threshold:0.6", Capacity(), True)
    assert torch.equal(scheduler.choose(draft, beliefs.survival(draft, ()), Load(2)), draft.real)  # optimistic at first
    right = torch.tensor([[True, False, False, False]] * 2)
    for _ in range(10):
        beliefs.observe(StepRecord(kept=draft.real, accepted_nodes=right))
    assert scheduler.choose(draft, beliefs.survival(draft, ()), Load(2)).tolist() == right.tolist()
    assert beliefs.tried.tolist() == [20, 20, 0, 0]  # tokens behind a refused one carry no label


def test_nonsense_beliefs_become_survival():
    nonsense = torch.tensor([[0.5, float("nan"), 3.0, 0.9], [2.0, 1.0, 0.4, 0.4]])
    assert falling_survival(CHAIN, nonsense).tolist() == [[0.5, 0, 0, 0], [1, 1, 0, 0]]
    assert falling_survival(TREE, torch.tensor([[0.5, 0.6, 0.4, 0.2, 0.45]])).tolist() == [
        [0.5, 0.5, pytest.approx(0.4), pytest.approx(0.2), pytest.approx(0.4)]
    ]


def test_survival_is_the_product_along_the_path():
    assert torch.allclose(survival_of(CHAIN, CHAIN.confidence)[0], torch.tensor([0.9, 0.45, 0.405, 0.3645]))
    assert torch.allclose(survival_of(TREE, TREE.confidence)[0], torch.tensor([0.9, 0.45, 0.81, 0.405, 0.729]))


def test_a_scheduler_may_write_into_what_it_is_given():
    for draft in (CHAIN, Draft(CHAIN.tokens, CHAIN.sizes)):  # of the same sizes
        assert draft.real.tolist() == [[True] * 4, [True, True, False, False]]
        draft.real[:, 1:] = False


def test_depth_and_spreading():
    assert TREE.depth.tolist() == [[1, 2, 2, 3, 3]]
    spread = CHAIN.among([2, 0], 3)
    assert spread.sizes.tolist() == [2, 0, 4]
    assert torch.equal(spread.confidence[2], CHAIN.confidence[0])
    assert not spread.real[1].any()
