"""What one step of a block drafter needs, and how its blocks attend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dspark.target.kernels import kernel_for


class Step(NamedTuple):
    """Everything a step needs, as tensors: B requests, N positions that were not read before, P slots of a block.

    features [N, F], positions [N]     the news: committed since the last step, or by a request that was not asked
    rows, slots [N + B*P]              where keys and values of news and blocks are kept
    anchors [B], starts [B]            last committed tokens and their positions
    chosen [B] or None                 rows of the requests; None: they are the first B
    visible [B]                        context positions each block sees
    mask [B, 1, 1, P + S]              added to scores; S is the longest context
    keys, values                       per layer, as ContextRows has them
    """

    features: Tensor
    positions: Tensor
    rows: Tensor
    slots: Tensor
    anchors: Tensor
    starts: Tensor
    visible: Tensor
    chosen: Tensor | None
    mask: Tensor
    keys: list[Tensor]
    values: list[Tensor]


def attend_to_rows(q: Tensor, k: Tensor, v: Tensor, step: Step, layer: int) -> Tensor:
    """Keep k and v of news and blocks; every slot of a block attends to its context and its whole block, without order.

    q [B*P, heads, D], k and v [N + B*P, KV, D]. Returns [B*P, heads, D].
    """
    batch, num_slots, (_, kv_heads, width) = len(step.anchors), step.mask.shape[-1], k.shape
    keys = step.keys[layer].index_put_((step.rows, step.slots), k)
    values = step.values[layer].index_put_((step.rows, step.slots), v)
    size, group = q.shape[0] // batch, q.shape[1] // kv_heads
    attend_slots = kernel_for(q, size)
    if attend_slots is not None:
        first = (torch.arange(batch, device=q.device) if step.chosen is None else step.chosen) * keys.shape[1]
        slots = first[:, None] + torch.arange(num_slots, device=q.device)
        places = step.starts[:, None] + torch.arange(size, device=q.device)
        inside = torch.ones(batch, size, size, dtype=torch.bool, device=q.device)
        rows = (keys.flatten(0, 1), values.flatten(0, 1), slots, step.visible, places, inside)
        return attend_slots(q, *rows, None, None, width**-0.5, 0, 0.0, None)
    if step.chosen is None:
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
