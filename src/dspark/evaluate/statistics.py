"""Are two samples from one law, and how sure is a ratio?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import ArrayLike

_RESAMPLES = 4000
_FEWEST = 10  # of a category in both samples together; rarer ones are tested as one


@dataclass(frozen=True)
class TwoSamples:
    """Result of a two-sample test: `p` is the chance of a difference at least this large between samples of one law."""

    statistic: float
    degrees: int
    p: float


def g_test(a: Iterable[Hashable], b: Iterable[Hashable]) -> TwoSamples:
    """Log-likelihood ratio test of two samples of outcomes (Sokal and Rohlf 1981, two-way table)."""
    counts_a, counts_b = Counter(a), Counter(b)
    table = [(counts_a[x], counts_b[x]) for x in {*counts_a, *counts_b}]
    rare = [row for row in table if sum(row) < _FEWEST]
    table = [row for row in table if sum(row) >= _FEWEST]
    if rare:
        table.append((sum(x for x, _ in rare), sum(y for _, y in rare)))
    totals = (counts_a.total(), counts_b.total())
    everything = sum(totals)
    statistic = 2 * sum(
        n * math.log(n * everything / (sum(row) * total))
        for row in table
        for n, total in zip(row, totals, strict=True)
        if n
    )
    statistic, degrees = max(0.0, statistic), len(table) - 1
    p = float(torch.special.gammaincc(torch.tensor(degrees / 2).double(), torch.tensor(statistic / 2).double()))
    return TwoSamples(statistic, degrees, p if degrees else 1.0)


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval that holds the truth with the stated confidence."""

    value: float
    low: float
    high: float

    def as_json(self) -> list[float]:
        return [self.value, self.low, self.high]


def ratio_of_rates(a: ArrayLike, b: ArrayLike, confidence: float = 0.95) -> Interval:
    """Rate of b over rate of a, measured on the same n units: a, b [n, 2] hold amounts and what they took.

    Rates are sums over sums. The interval is a paired bootstrap of units, widened for small n (Hesterberg 2015), on the
    logarithm, so that a over b has the reciprocal one.
    """
    pair = np.stack([np.asarray(a, dtype=float), np.asarray(b, dtype=float)])  # [2, n, 2]
    n = pair.shape[1]
    if n < 2:
        raise ValueError("an interval needs two units or more")

    def log_ratio(sums: np.ndarray) -> np.ndarray:
        """sums [2, ..., 2] -> [...]"""
        logs: np.ndarray = np.log(sums[1, ..., 0] / sums[1, ..., 1]) - np.log(sums[0, ..., 0] / sums[0, ..., 1])
        return logs

    value = float(log_ratio(pair.sum(1)))
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), _RESAMPLES).astype(float)
    resampled = log_ratio(weights @ pair) - value
    wider = math.sqrt(n / (n - 1)) * _t_quantile(n - 1, confidence) / NormalDist().inv_cdf((1 + confidence) / 2)
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2]) * wider
    return Interval(math.exp(value), math.exp(value + low), math.exp(value + high))


def _t_quantile(degrees: int, confidence: float) -> float:
    """Of Student's t, two-sided, by its expansion about the normal one (Abramowitz and Stegun 26.7.5)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3
