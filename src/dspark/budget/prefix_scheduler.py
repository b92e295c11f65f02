"""Which draft tokens the target reads this step. Pure functions of the draft; no model is needed to test them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from dspark.errors import InvalidConfiguration
from dspark.types import Draft, PrefixScheduler

log = logging.getLogger(__name__)


def along_paths(draft: Draft, start: Tensor, step: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Carry a value from each node's parent to the node: [B, K] of step(value at the parent [B], k).

    start [B] is the anchor's value. Parents come before their children, so one pass is enough.
    """
    rows = torch.arange(draft.tokens.shape[0])
    values = [start]  # index 0 is the anchor, index k + 1 draft token k
    for k in range(draft.tokens.shape[1]):
        before = values[-1] if draft.parents is None else torch.stack(values, 1)[rows, draft.parents[:, k] + 1]
        values.append(step(before, k))
    return torch.stack(values[1:], 1) if len(values) > 1 else start.new_zeros(len(start), 0)


def survival_of(draft: Draft, confidence: Tensor) -> Tensor:
    """[B, K]  probability that each draft token and all its ancestors are accepted (paper 3.2.2)."""
    start = torch.ones(draft.tokens.shape[0], dtype=confidence.dtype)
    return along_paths(draft, start, lambda before, k: before * confidence[:, k])


class FixedLength:
    """Verify the first `length` tokens of every path, whatever the confidences."""

    anticipates = False

    def __init__(self, length: int) -> None:
        self.length = length

    def choose(self, draft: Draft, base_tokens: int) -> Tensor:
        return draft.real & (draft.depth <= self.length)


class ConfidenceThreshold:
    """Stop at the first token less likely to be accepted than `threshold` (the released code's static rule).

    Confidence k is known before token k is drawn, so this does not anticipate. Drafters without confidences are verified
    whole, which is said once.
    """

    anticipates = False

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._has_warned = False

    def choose(self, draft: Draft, base_tokens: int) -> Tensor:
        if draft.confidence is None:
            if not self._has_warned and draft.tokens.numel():
                log.warning("the drafter gives no confidences: threshold:%g verifies every draft token", self.threshold)
                self._has_warned = True
            return draft.real
        sure = draft.real & (draft.confidence >= self.threshold)
        start = torch.ones(draft.tokens.shape[0], dtype=torch.bool)
        return along_paths(draft, start, lambda before, k: before & sure[:, k])


def make_scheduler(name: str | PrefixScheduler) -> PrefixScheduler:
    """`fixed:7`, `threshold:0.6`, or an object that already is a scheduler."""
    if not isinstance(name, str):
        return name
    kind, _, value = name.partition(":")
    try:
        if kind == "fixed" and int(value) >= 0:
            return FixedLength(int(value))
        if kind == "threshold" and math.isfinite(float(value)):
            return ConfidenceThreshold(float(value))
    except ValueError:
        pass  # a value that is no number ends in the same message as an unknown name
    raise InvalidConfiguration(f"scheduler must be fixed:LENGTH or threshold:CONFIDENCE, such as fixed:7; got {name!r}")
