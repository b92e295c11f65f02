"""Attention while training: many blocks at once, each over its sequence before its anchor and over itself.

Two ways to the same numbers. Dense products with a mask run everywhere; FlexAttention never computes what nobody sees,
and is taken on CUDA where it compiles.

Shapes: B rows, S tokens of a sequence, A anchors of a sequence, K block size, D head size, KV key-value heads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

_log = logging.getLogger(__name__)

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [T, heads, D], k [T, KV, D], v [T, KV, D]) -> [T, heads, D]; q and k are normed and rotated."""


def attention_of_blocks(cached: list[tuple[Tensor, Tensor]], anchors: Tensor, block_size: int) -> Attend:
    """cached: per layer k, v [B * S, KV, D] of the context; anchors [B, A]."""
    compiled = _compiled_flex(anchors.device) if anchors.device.type == "cuda" else None  # it has no backward on CPU
    if compiled is None:
        return BlockAttention(cached, anchors, block_size)
    return FlexBlockAttention(cached, anchors, block_size, compiled)


class BlockAttention:
    """Training-time `attend`: every block sees its sequence strictly before its anchor, and itself in both directions.

    Scores against the context and against the block are made apart and share one softmax, so that no block's keys are
    ever compared with another block's queries.
    """

    def __init__(self, cached: list[tuple[Tensor, Tensor]], anchors: Tensor, block_size: int) -> None:
        """cached: per layer k, v [B * S, KV, D] of the context; anchors [B, A]."""
        self.batch, self.num_anchors = anchors.shape
        self.size = block_size
        self.cached = cached
        length = cached[0][0].shape[0] // self.batch
        hidden_from = torch.arange(length, device=anchors.device) >= anchors[:, :, None]  # [B, A, S]
        self.bias = torch.zeros(hidden_from.shape, device=anchors.device).masked_fill_(hidden_from, float("-inf"))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, anchors, size = self.batch, self.num_anchors, self.size
        heads, kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[2]
        group = heads // kv_heads
        q = q * head_dim**-0.5
        q = q.view(batch, anchors, size, kv_heads, group, head_dim).permute(0, 3, 1, 4, 2, 5)  # [B, KV, A, G, K, D]
        k, v = (
            x.view(batch, anchors, size, kv_heads, head_dim).permute(0, 3, 1, 2, 4) for x in (k, v)
        )  # [B, KV, A, K, D]
        k_context, v_context = (x.view(batch, -1, kv_heads, head_dim).transpose(1, 2) for x in self.cached[layer])
        to_context = (q.flatten(2, 4) @ k_context.mT).unflatten(2, (anchors, group * size))  # [B, KV, A, G K, S]
        to_block = q.flatten(3, 4) @ k.mT  # [B, KV, A, G K, K]
        length = k_context.shape[2]
        to_context = to_context + self.bias[:, None, :, None]  # fp32 from here on, or fp64
        scores = torch.cat([to_context, to_block.to(to_context.dtype)], -1)
        law = torch.softmax(scores, -1).to(v.dtype)
        mixed = (law[..., :length].flatten(2, 3) @ v_context).unflatten(2, (anchors, group * size)) + law[
            ..., length:
        ] @ v
        return mixed.unflatten(3, (group, size)).permute(0, 2, 4, 1, 3, 5).reshape(-1, heads, head_dim)


class FlexBlockAttention:
    """The same as one FlexAttention over context and blocks: tiles that no query sees are left out.

    attend  `flex_attention`, or the same compiled
    """

    def __init__(
        self,
        cached: list[tuple[Tensor, Tensor]],
        anchors: Tensor,
        block_size: int,
        attend: Callable[..., Any] = flex_attention,
    ) -> None:
        """As BlockAttention."""
        self.batch, self.cached, self._attend = len(anchors), cached, attend
        length, num_queries = cached[0][0].shape[0] // self.batch, anchors.shape[1] * block_size

        def sees(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            block = query // block_size
            in_context = (key < length) & (key < anchors[row, block])
            return in_context | ((key >= length) & ((key - length) // block_size == block))

        keys = length + num_queries
        self.mask = create_block_mask(sees, self.batch, None, num_queries, keys, device=anchors.device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k_context, v_context = self.cached[layer]
        keys, values = self._after(k_context, k).to(v.dtype), self._after(v_context, v)
        queries = self._by_head(q).to(v.dtype)
        mixed: Tensor = self._attend(queries, keys, values, block_mask=self.mask, enable_gqa=True)
        return mixed.transpose(1, 2).flatten(0, 1)

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.batch, -1)).transpose(1, 2)

    def _after(self, context: Tensor, block: Tensor) -> Tensor:
        return torch.cat([self._by_head(context), self._by_head(block)], 2)


@cache
def _compiled_flex(device: torch.device) -> Callable[..., Any] | None:
    """FlexAttention compiled for the device, once it has gone there and back with a small case; None if it does not."""
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=True)
    q, k = torch.randn(1, 28, 4, 64, device=device), torch.randn(1, 60, 2, 64, device=device)
    anchors = torch.tensor([[5, 9, 30, 31]], device=device)
    try:
        attend = FlexBlockAttention([(k[0], k[0])], anchors, 7, compiled)
        attend(0, q[0].requires_grad_(), k[0, :28], k[0, :28]).sum().backward()
    except RuntimeError as error:  # the compiler's own errors all derive from it
        reason = str(error).strip().splitlines() or [type(error).__name__]
        _log.warning("training attends by dense products, because FlexAttention does not compile here: %s", reason[0])
        return None
    return compiled
