"""Schedulers that weigh draft tokens against seconds (paper 3.2.2 and 5.2): as many committed tokens per second as can be.

All of them admit tokens by falling survival. Survival never rises along a path and parents come first among equals, so
whatever is admitted is closed under ancestors, for chains and trees alike, and no other choice of as many tokens is
expected to commit more. What differs is where they stop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import accumulate, pairwise, takewhile
from operator import itemgetter
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark.types import Draft, Load

Floats = NDArray[np.float64]

# A draft token: its believed survival, its place in its request's draft, and its request. Lists of them, because drafts
# have few, which arrays would take longer over.
Token = tuple[float, int, int]


class StepCost(Protocol):
    """Seconds of a step as far as they are known (capacity.py)."""

    def seconds(
        self, tokens: Floats | NDArray[np.int64], requests: int, context_tokens: int, is_reading: bool = False
    ) -> Floats:
        """[n]  seconds of steps that read so many tokens [n]; never falling. is_reading: some of them are prompts."""
        ...


def by_survival(survival: Tensor) -> list[Token]:
    """Draft tokens with a chance, likeliest first.

    Among equals the shallower, then the earlier request comes first, as Algorithm 1 would pop them.
    """
    places = enumerate(zip(*survival.tolist(), strict=True))
    tokens = [(chance, k, b) for k, column in places for b, chance in enumerate(column) if chance > 0]
    tokens.sort(key=itemgetter(0), reverse=True)
    return tokens


def seconds_of_step(cost: StepCost, load: Load, num_drafted: int) -> Floats:
    """[n + 1]  seconds, drafting included, when 0 .. n draft tokens are verified.

    Prompts in the same step make every draft token as dear as it is on top of them, but what they cost themselves is
    not charged to the tokens committed now: it is spent whatever is chosen.
    """
    counts = np.arange(num_drafted + 1)
    if not load.num_prompt_tokens:
        seconds = cost.seconds(load.base_tokens + counts, load.num_requests, load.context_tokens)
    else:
        num_decoding = max(1, load.base_tokens - load.num_prompt_tokens)
        full = cost.seconds(load.base_tokens + counts, load.num_requests, load.context_tokens, is_reading=True)
        alone = cost.seconds(np.array([num_decoding]), num_decoding, load.context_tokens)
        seconds = full - full[0] + alone[0]
    return seconds + load.draft_seconds


def expected_rates(cost: StepCost, num_requests: int, tokens: Sequence[Token], load: Load) -> list[float]:
    """(n + 1)  committed tokens per second to expect when the first 0 .. n of these draft tokens are verified."""
    committed = accumulate((chance for chance, _, _ in tokens), initial=float(num_requests))
    seconds = seconds_of_step(cost, load, len(tokens)).tolist()
    return [number / time for number, time in zip(committed, seconds, strict=True)]


def keep_all(survival: Tensor, tokens: Sequence[Token]) -> Tensor:
    """keep [B, K], as survival, of these tokens."""
    keep = np.zeros(survival.shape, dtype=bool)
    for _, k, b in tokens:
        keep[b, k] = True
    return torch.from_numpy(keep)


class Optimal:
    """The most committed tokens per second that current beliefs allow, over all ways to choose.

    It looks at every confidence before it decides about any token, so it anticipates: for the coupled rule only.
    """

    anticipates = True

    def __init__(self, cost: StepCost) -> None:
        self.cost = cost

    def choose(self, draft: Draft, survival: Tensor, load: Load) -> Tensor:
        tokens = by_survival(survival)
        return keep_all(survival, tokens[: best_count(self.cost, len(survival), tokens, load)])


class EarlyStop:
    """The paper's Algorithm 1: admit one by one and stop at the first token that does not raise tokens per second.

    A confidence matters only if the token before it was admitted, so nothing is known of a token when it is chosen and
    the rejection rule stays lossless. In trees this holds when siblings come with falling confidence.
    """

    anticipates = False

    def __init__(self, cost: StepCost) -> None:
        self.cost = cost

    def choose(self, draft: Draft, survival: Tensor, load: Load) -> Tensor:
        tokens = by_survival(survival)
        steps = pairwise(expected_rates(self.cost, len(survival), tokens, load))
        admitted = takewhile(lambda step: step[1] > step[0], steps)
        return keep_all(survival, tokens[: sum(1 for _ in admitted)])


class Lagged:
    """The paper's 5.2: how many tokens comes from the optimum of two steps ago, which ones from survival now.

    History alone sets the number, and a token deeper in a request never displaces one before it, so the rejection rule
    stays lossless without an early stop; on staircases of cost it comes much closer to the optimum. Until there is
    history, everything is verified. When the number of requests changes, the budget changes in proportion.
    """

    anticipates = False
    _LAG = 2

    def __init__(self, cost: StepCost) -> None:
        self.cost = cost
        self._tokens_per_request: deque[float] = deque(maxlen=self._LAG)

    def choose(self, draft: Draft, survival: Tensor, load: Load) -> Tensor:
        tokens = by_survival(survival)
        if not survival.numel():
            return keep_all(survival, ())
        is_known = len(self._tokens_per_request) == self._LAG
        count = round(self._tokens_per_request[0] * len(survival)) if is_known else len(tokens)
        optimum = best_count(self.cost, len(survival), tokens, load)
        self._tokens_per_request.append(optimum / len(survival))
        return keep_all(survival, tokens[:count])


def best_count(cost: StepCost, num_requests: int, tokens: Sequence[Token], load: Load) -> int:
    """How many of these draft tokens give the most committed tokens per second; of equals the fewest."""
    if not tokens:
        return 0
    rate = expected_rates(cost, num_requests, tokens, load)
    return rate.index(max(rate))
