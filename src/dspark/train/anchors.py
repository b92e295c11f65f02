"""Where blocks start in a training sequence: anywhere a decode round could start (paper 3.3, 5.1)."""

from __future__ import annotations

import torch
from torch import Tensor


def is_candidate(loss_mask: Tensor) -> Tensor:
    """loss_mask [B, S] -> [B, S]: the token and the one after it are both the assistant's.

    So the first anchor is the first answer token, as in the first decode round, and never the last prompt token.
    """
    candidates = torch.zeros_like(loss_mask)
    candidates[:, :-1] = loss_mask[:, :-1] & loss_mask[:, 1:]
    return candidates


def choose_anchors(
    loss_mask: Tensor, num_anchors: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """(anchors [B, A] ascending, kept [B, A]): uniform without replacement; sequences with too few get fillers at 0."""
    candidates = is_candidate(loss_mask)
    num_anchors = min(num_anchors, max(1, int(candidates.sum(1).max())))
    order = torch.rand(loss_mask.shape, generator=generator).masked_fill_(~candidates, 2.0).argsort(1)[:, :num_anchors]
    kept = candidates.gather(1, order)
    anchors = order.masked_fill(~kept, loss_mask.shape[1]).sort(1).values
    kept = anchors < loss_mask.shape[1]
    return anchors.masked_fill(~kept, 0), kept
