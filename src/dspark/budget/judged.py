"""What a step says of its drafts: tokens that were verified, and whose ancestors were all accepted, are judged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

FEW = 64  # tokens: once in a step a processor spends more time on remembering how each operation on arrays is done


class Judged(NamedTuple):
    """Judged tokens, and what they say of each draft (B).

    tokens    which of all [B, K] they are, rows one after the other
    happened  of each: 0 or 1, or how likely it was to happen
    misses    sums of what happened less what was believed
    evidence  sums of p (1 - p), p believed; 0: nothing was judged
    """

    tokens: Sequence[int] | NDArray[np.int64]
    happened: Sequence[float] | Floats
    misses: list[float]
    evidence: list[float]


def judge(
    kept: Bools, accepted: Bools, parents: NDArray[np.int64] | None, chances: Floats | None, believed: Floats
) -> Judged:
    """All [B, K]: tokens that were verified, one root path each, predecessors (None: chains), how likely tokens were to be
    accepted (not a number: not known), which is the same on average and less of a gamble, and what was believed.
    """
    return (_in_lists if kept.size <= FEW else _in_arrays)(kept, accepted, parents, chances, believed)


def _in_arrays(
    kept: Bools, accepted: Bools, parents: NDArray[np.int64] | None, chances: Floats | None, believed: Floats
) -> Judged:
    with_anchor = np.insert(accepted, 0, True, axis=1)
    reached = with_anchor[:, :-1] if parents is None else np.take_along_axis(with_anchor, parents + 1, 1)
    tokens = np.flatnonzero(kept & reached)
    happened = accepted if chances is None else np.where(np.isnan(chances), accepted, chances)
    came, expected, drafts = happened.ravel()[tokens], believed.ravel()[tokens], tokens // kept.shape[1]
    misses = np.bincount(drafts, came - expected, len(kept))
    evidence = np.bincount(drafts, expected * (1 - expected), len(kept))
    return Judged(tokens, came.astype(np.float64), misses.tolist(), evidence.tolist())


def _in_lists(
    kept: Bools, accepted: Bools, parents: NDArray[np.int64] | None, chances: Floats | None, believed: Floats
) -> Judged:
    tokens: list[int] = []
    happened: list[float] = []
    misses, evidence = [], []
    in_chain = range(-1, kept.shape[1] - 1)
    rows = zip(kept.tolist(), accepted.tolist(), believed.tolist(), strict=True)
    for b, (is_kept, is_accepted, expected) in enumerate(rows):
        miss = told = 0.0
        for k, parent in enumerate(in_chain if parents is None else parents[b].tolist()):
            if is_kept[k] and (parent < 0 or is_accepted[parent]):
                chance = math.nan if chances is None else float(chances[b, k])
                came = float(is_accepted[k]) if math.isnan(chance) else chance
                tokens.append(b * kept.shape[1] + k)
                happened.append(came)
                miss, told = miss + came - expected[k], told + expected[k] * (1 - expected[k])
        misses.append(miss)
        evidence.append(told)
    return Judged(tokens, happened, misses, evidence)
