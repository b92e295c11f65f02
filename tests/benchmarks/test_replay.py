"""A replay goes through a text as an engine would, whatever is believed of its drafts."""

from __future__ import annotations

import random

import pytest
import torch

from benchmarks.recorded import Text, num_common, rounds_of
from benchmarks.replay import Calibrated, Knee, Knowing, Replay
from dspark.budget.beliefs import LiveBeliefs
from dspark.budget.prefix_scheduler import FixedLength
from dspark.budget.throughput import Optimal


def text(accepted: list[int], has_ended: bool = False, seed: int = 0) -> Text:
    """Of len(accepted) + 1 tokens."""
    rng = random.Random(seed)
    return Text("math", 5, [[rng.random() for _ in range(7)] for _ in accepted], accepted, has_ended)


def test_what_a_draft_and_a_text_have_in_common() -> None:
    assert [num_common(d, [1, 2, 3]) for d in ([], [2], [1, 2, 4], [1, 2, 3, 4])] == [0, 0, 2, 3]


@pytest.mark.parametrize("length", [0, 1, 2, 7])
def test_a_fixed_length_commits_the_text_and_nothing_else(length: int) -> None:
    accepted = [2, 0, 1, 3, 2, 1, 0, 1]
    replay = Replay(Calibrated(None), FixedLength(length), Knee(), 1)
    replay.slots = [replay.slot([text(accepted)])]
    anchors = []
    while replay.slots[0].left:
        anchors.append(replay.slots[0].anchor)
        replay.step()
    expected, at = [], 0
    while at < len(accepted):
        expected.append(at)
        at += min(accepted[at], length) + 1
    assert anchors == expected and sum(replay.steps.tokens) == len(accepted)
    # The limit of tokens leaves no room for a draft token in place of the last one.
    assert all(v <= len(accepted) - a - 1 for v, a in zip(replay.steps.verified, anchors, strict=True))


def test_rounds_are_those_of_full_verification() -> None:
    outcomes = rounds_of([text([2, 0, 1, 3, 2, 1, 0, 0], has_ended=True), text([0] * 12)])
    assert outcomes.prompts.tolist() == [0] * 3 + [1] * 5
    assert outcomes.accepted.sum(1).tolist() == [2, 3, 0, 0, 0, 0, 0, 0]
    assert outcomes.known[:3].sum(1).tolist() == [7, 5, 1]  # past the end of a text nothing is known


def test_knowing_all_wastes_nothing_and_beats_any_beliefs() -> None:
    rng = random.Random(1)
    texts = [text([rng.choice((0, 1, 2, 5)) for _ in range(40)], seed=seed) for seed in range(8)]
    costs = Knee(knee=8)
    rates = {}
    for name, beliefs in (("knowing", Knowing()), ("raw", Calibrated(None)), ("live", LiveBeliefs(num_positions=7))):
        steps = Replay(beliefs, Optimal(costs), costs, 4).serve(texts, 150)
        rates[name] = steps.rate()
        if name == "knowing":
            assert steps.verified == steps.accepted and torch.equal(steps.believed[0] > 0, steps.happened[0])
    assert rates["knowing"] > 1.1 * max(rates["raw"], rates["live"])
    assert rates["live"] > rates["raw"]  # confidences are noise here, and live beliefs find out
