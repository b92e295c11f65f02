"""Has something changed that nobody announced? One-sided CUSUM on acceptance, two-sided on what the target thinks of
its own text (Page 1954).

Acceptance falls when a drafter no longer fits: another target, other users, a broken checkpoint. The target's mean
log-probability of its tokens moves when the text itself is another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from dspark.monitor.canaries import Outcome
from dspark.types import RequestRecord

ALLOWANCE = 0.5  # standard errors that do not count: a shift of twice this is found soonest
# Batches between false alarms: over 20,000 (tests/monitor/test_drift.py simulates it); a shift of 2 errors takes about 9.
THRESHOLD = 12.0
CLASSES = ("greedy", "sampled")


@dataclass
class Cusum:
    """Sums of standardised deviations from a reference that is learned from the first observations.

    Observations are taken in batches of `batch`; the first `num_reference` batches say what is normal.
    """

    batch: int = 50
    num_reference: int = 40
    least_deviation: float = 0.02  # of a batch: a reference without any spread would see drift in nothing
    low: float = 0.0  # evidence for a fall and for a rise, in standard errors
    high: float = 0.0
    mean: float = math.nan
    deviation: float = math.nan
    _sum: float = 0.0
    _count: int = 0
    _reference: list[float] = field(default_factory=list)

    @property
    def is_learning(self) -> bool:
        return len(self._reference) < self.num_reference

    def add(self, value: float) -> bool:
        """Take one observation; whether a batch has been completed by it and counted."""
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count < self.batch:
            return False
        mean, self._sum, self._count = self._sum / self._count, 0.0, 0
        if self.is_learning:
            self._reference.append(mean)
            if not self.is_learning:
                self._learn()
            return False
        z = (mean - self.mean) / self.deviation
        self.low = max(0.0, self.low - z - ALLOWANCE)
        self.high = max(0.0, self.high + z - ALLOWANCE)
        return True

    def _learn(self) -> None:
        self.mean = sum(self._reference) / len(self._reference)
        variance = sum((x - self.mean) ** 2 for x in self._reference) / (len(self._reference) - 1)
        self.deviation = max(math.sqrt(variance), self.least_deviation)


def by_temperature(record: RequestRecord) -> str:
    """The class of a request: acceptance differs between greedy and sampled text."""
    return CLASSES[record.params.temperature > 0]


class Drift:
    """Watches finished requests (`request`) and canaries (`canary`) and calls `alarm(signal, class, cusum)` once for
    each excursion: first_token_acceptance by class, and target_logprob.

    class_of  names one of `classes` for each request
    """

    def __init__(
        self,
        alarm: Callable[[str, str, Cusum], object],
        class_of: Callable[[RequestRecord], str] = by_temperature,
        classes: tuple[str, ...] = CLASSES,
        *,
        batch: int = 50,
        num_reference: int = 40,
    ) -> None:
        self.alarm, self.class_of = alarm, class_of
        self.acceptance = {name: Cusum(batch, num_reference) for name in classes}
        self.logprob = {name: Cusum(max(1, batch // 10), num_reference) for name in classes}
        self._alarmed: set[tuple[str, str]] = set()

    def request(self, record: RequestRecord) -> None:
        """Observer of finished requests: was the first token of each draft accepted?"""
        name = self.class_of(record)
        cusum = self.acceptance[name]
        for round in record.rounds:
            if round.verified and cusum.add(float(round.accepted > 0)):
                self._look("first_token_acceptance", name, cusum, cusum.low)

    def canary(self, outcome: Outcome) -> None:
        """Observer of canaries: how likely does the target find what it writes?"""
        if outcome.logprob is None:
            return
        name = self.class_of(outcome.record)
        cusum = self.logprob[name]
        if cusum.add(outcome.logprob):
            self._look("target_logprob", name, cusum, max(cusum.low, cusum.high))

    def _look(self, signal: str, name: str, cusum: Cusum, evidence: float) -> None:
        if evidence > THRESHOLD and (signal, name) not in self._alarmed:
            self._alarmed.add((signal, name))
            self.alarm(signal, name, cusum)
        elif evidence == 0:
            self._alarmed.discard((signal, name))
