"""A forward of one chain and nothing else, laid out in tensors that are kept: what a single request asks for in every step.

Making a tensor of a few numbers takes several times as long as writing numbers into one that is there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dspark.target.plan import Group, Plan, Visibility
from dspark.types import Span


class _Tables(NamedTuple):
    """Of N tokens. numbers [3, N]: token ids, positions and slots to write to, and the same as tensors; see Visibility."""

    numbers: np.ndarray
    token_ids: Tensor
    positions: Tensor
    write: Tensor
    logit_rows: Tensor
    starts: Tensor
    queries: Tensor
    inside: Tensor | None
    firsts: Tensor

    @classmethod
    def of(cls, num_tokens: int, num_logits: int) -> _Tables:
        numbers = np.zeros((3, num_tokens), dtype=np.int64)
        token_ids, positions, write = torch.from_numpy(numbers)
        logit_rows = torch.arange(num_tokens - num_logits, num_tokens)
        inside = None if num_tokens == 1 else torch.from_numpy(np.tri(num_tokens, dtype=bool)[None])
        no_firsts = torch.zeros(1, dtype=torch.long)  # no view leaves anything out
        return cls(numbers, token_ids, positions, write, logit_rows, positions[:1], positions[None], inside, no_firsts)


class LoneChains:
    """Lays out one chain after another. What it gave for one is stale as soon as it lays out the next."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], _Tables] = {}

    def lay_out(self, span: Span, write: np.ndarray, slots: np.ndarray) -> tuple[Plan, tuple[Tensor, Tensor, Tensor]]:
        """The plan, and token_ids [T], positions [T], logit_rows [R], as `read_spans` and `make_plan` for a graph.

        slots [S]  of all that the chain sees, itself included; write [T] are the last of them
        """
        num_tokens, start = len(span.tokens), span.start
        tables = self._kept.get((num_tokens, span.num_logits))
        if tables is None:
            tables = self._kept[num_tokens, span.num_logits] = _Tables.of(num_tokens, span.num_logits)
        tables.numbers[:2] = span.tokens, range(start, start + num_tokens)
        tables.numbers[2] = write
        is_alone = num_tokens == 1
        seen = Visibility(tables.starts, tables.queries, tables.inside, len(slots), tables.firsts)
        is_causal = start == 0 and not is_alone
        group = Group(torch.from_numpy(slots[None]), seen, sees_all=is_alone, is_causal=is_causal)
        plan = Plan(tables.write, [group], is_for_graph=len(slots) > 1)
        return plan, (tables.token_ids, tables.positions, tables.logit_rows)
