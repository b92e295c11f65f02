"""Every scheduler under both acceptance rules: the exact law of what is committed, by enumerating all randomness."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dspark.budget.baselines import StartupTable, TokensPerBatch
from dspark.budget.prefix_scheduler import ConfidenceThreshold, FixedLength
from dspark.budget.throughput import EarlyStop, Lagged, Optimal
from dspark.types import Request, SamplingParams
from dspark.verify import Coupled, Rejection
from tests.enumeration import TableDrafter, decode_law, distance, law_of, random_table, step, target_law

EXACT, BIASED = 1e-12, 1e-3
RULES = pytest.mark.parametrize("rule", [Coupled, Rejection])


class Listed:
    """Steps per second for 1, 2, … tokens."""

    def __init__(self, *steps_per_second: float) -> None:
        self.steps_per_second = np.array(steps_per_second)

    def seconds(self, tokens, requests, context_tokens, is_reading=False):
        return 1 / self.steps_per_second[np.clip(np.asarray(tokens) - 1, 0, len(self.steps_per_second) - 1)]


SMOOTH, STAIRS = Listed(1, 0.95, 0.8, 0.7, 0.55, 0.5), Listed(1, 1, 0.7, 0.7, 0.69, 0.4)


class WithHistory(Lagged):
    """Each choice as if so many tokens per request had been best two steps ago and one step ago."""

    def __init__(self, cost, *tokens_per_request: float) -> None:
        super().__init__(cost)
        self.history = tokens_per_request

    def choose(self, draft, survival, load):
        self._tokens_per_request.extend(self.history)
        return super().choose(draft, survival, load)


HISTORY_OR_BEFORE = [
    FixedLength(1),
    ConfidenceThreshold(0.5),
    EarlyStop(SMOOTH),
    EarlyStop(STAIRS),
    WithHistory(STAIRS, 1.5, 0.5),
    WithHistory(SMOOTH, 0.5, 2.0),
    TokensPerBatch(SMOOTH),
]
LOOKING_AHEAD = [Optimal(SMOOTH), Optimal(STAIRS), StartupTable(STAIRS)]


def reflected(tokens: tuple[int, ...], token: int) -> float:
    """A confidence in (0, 1) that depends on all the tokens before and not on the token itself."""
    return sum((t + 1) * 0.37 * (i + 1) for i, t in enumerate(tokens)) % 1.0


def deviation(rule, scheduler) -> float:
    target, drafter = random_table(33, 2), TableDrafter(random_table(34, 2), confidence=reflected)
    found = decode_law(rule, drafter, scheduler, target, num_tokens=2, num_requests=2)
    return distance(found, target_law(target, 2, num_requests=2))


@RULES
@pytest.mark.parametrize("scheduler", HISTORY_OR_BEFORE, ids=lambda s: type(s).__name__)
def test_two_requests_follow_the_target(rule, scheduler):
    assert not scheduler.anticipates
    assert deviation(rule, scheduler) < EXACT


@pytest.mark.parametrize("scheduler", LOOKING_AHEAD, ids=lambda s: type(s).__name__)
def test_looking_ahead_is_right_under_the_coupled_rule(scheduler):
    assert scheduler.anticipates
    assert deviation(Coupled, scheduler) < EXACT


def test_looking_ahead_is_wrong_under_the_rejection_rule():
    """The test above could see it: with this machine the optimum is biased."""
    assert deviation(Rejection, Optimal(Listed(1, 1, 0.6, 0.59, 0.5, 0.5))) > BIASED


def appendix_a(rule, kind) -> float:
    """Probability that the first token is A; the target says 0.70."""
    second = lambda tokens, token: 0.8 if len(tokens) == 1 else [0.9, 0.0][tokens[-1]]  # noqa: E731
    drafter = TableDrafter(lambda prefix: (0.0, 0.0), confidence=second)
    target = lambda prefix: (float(torch.tensor(0.7).log()), float(torch.tensor(0.3).log()))  # noqa: E731
    return decode_law(rule, drafter, kind(Listed(1, 0.5, 0.45)), target, 1)[((0,),)]


def test_the_papers_appendix_a():
    assert appendix_a(Rejection, EarlyStop) == pytest.approx(0.70, abs=1e-6)
    assert appendix_a(Rejection, Optimal) == pytest.approx(0.85, abs=1e-6)
    assert appendix_a(Coupled, EarlyStop) == pytest.approx(0.70, abs=1e-6)
    assert appendix_a(Coupled, Optimal) == pytest.approx(0.70, abs=1e-6)


@RULES
def test_lagged_with_its_own_history(rule):
    """Several rounds under one randomness: the number of tokens comes from what earlier rounds drafted."""
    target, drafter = random_table(35, 2), TableDrafter(random_table(36, 2), confidence=reflected)

    def decode(draws):
        scheduler, request = Lagged(STAIRS), Request(0, [0], SamplingParams(), 1, seed=5)
        while len(request.generated) < 4:
            request.tokens += step([request], drafter, scheduler, rule(draws), target)[0]
        return tuple(request.generated[:4])

    expected = {output[0]: p for output, p in target_law(target, 4).items()}
    assert distance(law_of(decode), expected) < EXACT
