"""Which draft tokens the target reads this step, by rules that know nothing of cost; and values carried along paths."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dspark.types import Draft, Load

_ROUNDING = 1e-6  # a product divided by its factor is not quite the other factor


def along_paths(draft: Draft, start: Tensor, step: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Carry a value from each node's parent to the node: [B, K] of step(value at the parent [B], k).

    start [B] is the anchor's value. Parents come before their children, so one pass is enough.
    """
    rows = torch.arange(draft.tokens.shape[0])
    values = [start]  # index 0 is the anchor, index k + 1 draft token k
    for k in range(draft.tokens.shape[1]):
        if draft.parents is None:
            before = values[-1]
        else:  # what lies in padding may point anywhere
            before = torch.stack(values, 1)[rows, draft.parents[:, k].clamp(max=k - 1) + 1]
        values.append(step(before, k))
    return torch.stack(values[1:], 1) if len(values) > 1 else start.new_zeros(len(start), 0)


def survival_of(draft: Draft, confidence: Tensor) -> Tensor:
    """[B, K]  probability that each draft token and all its ancestors are accepted (paper 3.2.2)."""
    if draft.parents is None:
        return confidence.cumprod(1)
    start = torch.ones(draft.tokens.shape[0], dtype=confidence.dtype)
    return along_paths(draft, start, lambda before, k: before * confidence[:, k])


def falling_survival(draft: Draft, survival: Tensor) -> Tensor:
    """[B, K]  beliefs made fit for schedulers: within 0 .. 1, 0 on padding and nonsense, never rising along a path."""
    sizes = draft.sizes.tolist()
    if draft.parents is None:  # a few numbers, which arrays would take longer over
        given = survival.tolist()
        rows = [_falling(row[:size]) + [0.0] * (len(row) - size) for row, size in zip(given, sizes, strict=True)]
        if rows == given:  # as most beliefs are
            return survival
        return torch.from_numpy(np.array(rows, dtype=survival.numpy().dtype).reshape(survival.shape))
    within = survival.nan_to_num(0.0).clamp(0.0, 1.0) * draft.real
    return along_paths(draft, within.new_ones(len(within)), lambda before, k: torch.minimum(before, within[:, k]))


def _falling(values: Sequence[float]) -> list[float]:
    """Of one path; what is no number is no chance."""
    before, falling = 1.0, []
    for value in values:
        before = min(before, value) if value > 0 else 0.0
        falling.append(before)
    return falling


class FixedLength:
    """Verify the first `length` tokens of every path, whatever the confidences."""

    anticipates = False
    heeds_beliefs = False

    def __init__(self, length: int) -> None:
        self.length = length

    def choose(self, draft: Draft, survival: Tensor, load: Load) -> Tensor:
        if draft.tokens.shape[1] <= self.length:  # no path can be longer
            return draft.real
        if draft.parents is None:
            keep = draft.real
            keep[:, self.length :] = False
            return keep
        return draft.real & (draft.depth <= self.length)


class ConfidenceThreshold:
    """Stop at the first token less likely to be accepted than `threshold` (the released code's static rule).

    The confidence of a token, given that its ancestors are accepted, is read back from believed survival: the drafter's
    own, calibrated, or the running acceptance at its depth. It is known before the token is drawn, so this does not
    anticipate.
    """

    anticipates = False

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def choose(self, draft: Draft, survival: Tensor, load: Load) -> Tensor:
        start = torch.ones(draft.tokens.shape[0], dtype=survival.dtype)
        below = survival < self.threshold * parent_survival(draft, survival) * (1 - _ROUNDING)
        sure = draft.real & ~below
        return along_paths(draft, start > 0, lambda before, k: before & sure[:, k])


def parent_survival(draft: Draft, survival: Tensor) -> Tensor:
    """[B, K]  survival of each token's predecessor; 1 for the anchor."""
    with_anchor = torch.cat([survival.new_ones(len(survival), 1), survival], 1)
    return with_anchor[:, :-1] if draft.parents is None else with_anchor.gather(1, draft.parents + 1)
