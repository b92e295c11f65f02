"""Schedulers are pure functions: every choice is closed under ancestors and never reaches into padding."""

from __future__ import annotations

import torch

from dspark.budget.prefix_scheduler import make_scheduler, survival_of
from dspark.types import Draft

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


def test_fixed_length():
    assert make_scheduler("fixed:3").choose(CHAIN, 2).tolist() == [
        [True, True, True, False],
        [True, True, False, False],
    ]
    assert make_scheduler("fixed:0").choose(CHAIN, 2).sum() == 0
    assert make_scheduler("fixed:2").choose(TREE, 1).tolist() == [[True, True, True, False, False]]


def test_threshold_stops_at_the_first_doubt():
    keep = make_scheduler("threshold:0.6").choose(CHAIN, 2)
    assert keep.tolist() == [[True, False, False, False], [True, True, False, False]]
    assert make_scheduler("threshold:0.6").choose(TREE, 1).tolist() == [[True, False, True, False, True]]
    assert make_scheduler("threshold:0").choose(CHAIN, 2).sum() == 6


def test_threshold_without_confidences_keeps_everything(caplog):
    scheduler = make_scheduler("threshold:0.6")
    draft = Draft(CHAIN.tokens, CHAIN.sizes)
    assert torch.equal(scheduler.choose(draft, 2), draft.real)
    scheduler.choose(draft, 2)
    assert len(caplog.records) == 1


def test_survival_is_the_product_along_the_path():
    assert torch.allclose(survival_of(CHAIN, CHAIN.confidence)[0], torch.tensor([0.9, 0.45, 0.405, 0.3645]))
    assert torch.allclose(survival_of(TREE, TREE.confidence)[0], torch.tensor([0.9, 0.45, 0.81, 0.405, 0.729]))


def test_depth_and_spreading():
    assert TREE.depth.tolist() == [[1, 2, 2, 3, 3]]
    spread = CHAIN.among([2, 0], 3)
    assert spread.sizes.tolist() == [2, 0, 4]
    assert torch.equal(spread.confidence[2], CHAIN.confidence[0])
    assert not spread.real[1].any()
