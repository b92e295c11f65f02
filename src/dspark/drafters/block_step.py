"""What one step of a block drafter needs, and how its blocks attend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dspark.target.kernels import kernel_for


class Step(NamedTuple):
    """Everything a step needs, as tensors: B requests, N positions that were not read before, P slots of a block.

    features [M, F]         those of the news among others: committed since the last step, or by a request that was not asked
    news [4, N]             their positions, the rows and slots where their keys and values are kept, and which features
    each [4, B]             last committed tokens, their positions, how much context each block sees, and its row
    mask [B, 1, 1, P + S]   added to scores; S is the longest context. None: whole rows, for a kernel that goes by `visible`
    is_first                whether the requests have the first B rows, in order; the kernel does not ask
    keys, values            per layer, as ContextRows has them

    So few tensors because making one costs more than what is in it.
    """

    features: Tensor
    news: Tensor
    each: Tensor
    mask: Tensor | None
    is_first: bool
    keys: list[Tensor]
    values: list[Tensor]

    @property
    def anchors(self) -> Tensor:
        """[B]"""
        return self.each[0]

    @property
    def starts(self) -> Tensor:
        """[B]  positions of the anchors"""
        return self.each[1]

    @property
    def visible(self) -> Tensor:
        """[B]"""
        return self.each[2]

    @property
    def chosen(self) -> Tensor:
        """[B]  rows of the requests"""
        return self.each[3]

    def places(self, size: int) -> tuple[Tensor, Tensor]:
        """rows, slots [N + B*P]  of news and blocks of `size` slots, which are scratch at the beginning of a row."""
        _, rows, slots, _ = self.news
        scratch = torch.arange(size, device=slots.device).expand(self.each.shape[1], size)
        return torch.cat([rows, self.chosen[:, None].expand_as(scratch).flatten()]), torch.cat(
            [slots, scratch.flatten()]
        )


def attend_to_rows(q: Tensor, k: Tensor, v: Tensor, step: Step, places: tuple[Tensor, Tensor], layer: int) -> Tensor:
    """Keep k and v of news and blocks; every slot of a block attends to its context and its whole block, without order.

    q [B*P, heads, D], k and v [N + B*P, KV, D], places of these as of Step. Returns [B*P, heads, D].
    """
    batch, (_, kv_heads, width) = step.each.shape[1], k.shape
    keys, values = step.keys[layer].index_put_(places, k), step.values[layer].index_put_(places, v)
    num_slots = keys.shape[1] if step.mask is None else step.mask.shape[-1]
    size, group = q.shape[0] // batch, q.shape[1] // kv_heads
    attend_slots = kernel_for(q, size)
    if attend_slots is not None:
        slots = step.chosen[:, None] * keys.shape[1] + torch.arange(num_slots, device=q.device)
        positions = step.starts[:, None] + torch.arange(size, device=q.device)
        inside = torch.ones(batch, size, size, dtype=torch.bool, device=q.device)
        rows = (keys.flatten(0, 1), values.flatten(0, 1), slots, step.visible, positions, inside)
        return attend_slots(q, *rows, None, None, width**-0.5, 0, 0.0, None)
    if step.is_first:
        keys, values = keys[:batch, :num_slots], values[:batch, :num_slots]
    else:
        keys, values = (
            keys[:, :num_slots].index_select(0, step.chosen),
            values[:, :num_slots].index_select(0, step.chosen),
        )
    # No slot sees less than another, so the query heads that share a key head are just more queries.
    queries = (
        q.view(batch, size, kv_heads, group, width).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, group * size, width)
    )
    mask = None if batch == 1 else step.mask  # one request sees all of its row
    y = F.scaled_dot_product_attention(queries, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask)
    return y.view(batch, kv_heads, group, size, width).permute(0, 3, 1, 2, 4).reshape(q.shape)
