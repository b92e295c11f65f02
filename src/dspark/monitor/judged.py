"""Which draft tokens of a step got a verdict, and which way it went. The rest was never reached: nobody knows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dspark.types import StepRecord


def judged_tokens(record: StepRecord) -> Iterator[tuple[int, bool, float | None]]:
    """(position from 0, accepted?, believed chance given its ancestors) of each draft token read whose ancestors were right.

    Position is depth: siblings of a tree share one. In plain Python, because every step asks: for so few tokens the calls
    of a tensor library take several times as long.
    """
    kept, accepted = record.kept, record.accepted_nodes
    if kept is None or accepted is None or not kept.numel():
        return
    num_requests, length = kept.shape
    chain = list(range(-1, length - 1))
    parents = [chain] * num_requests if record.parents is None else record.parents.tolist()
    survival: list[Any] = [None] * num_requests if record.survival is None else record.survival.tolist()
    for is_kept, is_right, before, believed in zip(kept.tolist(), accepted.tolist(), parents, survival, strict=True):
        yield from _judged(is_kept, is_right, before, believed)


def _judged(
    is_kept: list[bool], is_right: list[bool], parents: list[int], survival: list[float] | None
) -> Iterator[tuple[int, bool, float | None]]:
    """The same of one request; parents come before their children, and are kept where these are."""
    depths = [0] * len(parents)
    for k, parent in enumerate(parents):
        if not is_kept[k]:
            continue
        depths[k] = 0 if parent < 0 else depths[parent] + 1
        if parent >= 0 and not is_right[parent]:
            continue
        belief = None
        if survival is not None:  # a product divided by its factor can be a hair above 1
            belief = min(1.0, survival[k] / max(1e-12, 1.0 if parent < 0 else survival[parent]))
        yield depths[k], is_right[k], belief
