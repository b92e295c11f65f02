"""Are two samples from one law?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import torch

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
