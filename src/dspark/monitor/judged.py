"""Which draft tokens of a step got a verdict, and which way it went. The rest was never reached: nobody knows."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dspark.budget.prefix_scheduler import parent_survival
from dspark.types import Draft, StepRecord


def judged_tokens(record: StepRecord) -> Iterator[tuple[int, bool, float | None]]:
    """(position from 0, accepted?, believed chance given its ancestors) of each draft token read whose ancestors were right.

    Position is depth: siblings of a tree share one.
    """
    kept, accepted = record.kept, record.accepted_nodes
    if kept is None or accepted is None or not kept.numel():
        return
    draft = Draft(kept, kept.sum(1), parents=record.parents)
    reached = kept & (parent_survival(draft, accepted.double()) > 0)
    depths, right = draft.depth[reached].tolist(), accepted[reached].tolist()
    beliefs: list[float | None] = [None] * len(depths)
    if record.survival is not None:
        # A product divided by its factor can be a hair above 1.
        given_parent = record.survival / parent_survival(draft, record.survival).clamp_min(1e-12)
        beliefs = torch.clamp(given_parent, 0.0, 1.0)[reached].tolist()
    for depth, is_right, belief in zip(depths, right, beliefs, strict=True):
        yield depth - 1, is_right, belief
