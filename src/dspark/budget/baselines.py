"""Ways to choose the length that other engines have, for comparison."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from dspark.budget.prefix_scheduler import falling_survival, survival_of
from dspark.budget.raw_beliefs import RawBeliefs
from dspark.budget.throughput import StepCost, best_count, by_survival, keep_all, seconds_of_step
from dspark.types import Draft, Load, StepRecord


class TokensPerBatch:
    """One length for all requests, from running acceptance and the cost of a step (SmartSpec, Liu et al. 2024)."""

    anticipates = False
    heeds_beliefs = False

    def __init__(self, cost: StepCost) -> None:
        self.cost, self.running = cost, RawBeliefs()

    def choose(self, draft: Draft, survival: Tensor, load: Load) -> Tensor:
        if not survival.numel():
            return draft.real
        depth = draft.depth
        expected = falling_survival(draft, self.running.by_depth(draft)).double()
        lengths = range(int(depth.max()) + 1)
        parts = [draft.real & (depth <= length) for length in lengths]
        counts = np.array([int(part.sum()) for part in parts])
        tokens = np.array([len(survival) + float((expected * part).sum()) for part in parts])
        seconds = seconds_of_step(self.cost, load, int(counts.max()))[counts]
        return parts[int(np.argmax(tokens / seconds))]

    def observe(self, record: StepRecord) -> None:
        self.running.learn(record)


class StartupTable:
    """The global optimum with raw confidences and a table of seconds by tokens alone, fixed once and for all.

    The table is what capacity says at `context_tokens` per request when the first draft comes; context that grows and
    a machine that changes go unnoticed.
    """

    anticipates = True
    heeds_beliefs = False

    def __init__(self, cost: StepCost, context_tokens: int = 64) -> None:
        self.cost, self.context_tokens = cost, context_tokens
        self._seconds: np.ndarray | None = None

    def seconds(self, tokens: np.ndarray, requests: int, context_tokens: int, is_reading: bool = False) -> np.ndarray:
        longest = int(tokens.max())
        if self._seconds is None or longest >= len(self._seconds):
            sizes = np.arange(2 * longest + 1)
            self._seconds = self.cost.seconds(sizes, requests, self.context_tokens * requests)
        return self._seconds[np.asarray(tokens, dtype=np.int64)]

    def choose(self, draft: Draft, survival: Tensor, load: Load) -> Tensor:
        if draft.confidence is not None:
            survival = falling_survival(draft, survival_of(draft, draft.confidence))
        tokens = by_survival(survival)
        return keep_all(survival, tokens[: best_count(self, len(survival), tokens, load)])
