"""Attention of many requests in one flat forward, over slots. Registered with transformers under the name `NAME`.

A model that calls transformers' attention interface hands this function q, k and v of T flat tokens; the slots and who
sees whom come as keyword arguments of the model's forward, which transformers passes on to every layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from dspark.errors import UnsupportedModel
from dspark.target.kernels import kernel_for
from dspark.target.kv_cache import KVCache, gather
from dspark.target.plan import Group, Plan

NAME = "dspark"


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    *,
    plan: Plan | None = None,
    kv_cache: KVCache | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key [1, KV, T, D], value [1, KV, T, Dv] -> [1, T, H, Dv].

    sliding_window counts positions, softcap bounds the scores, s_aux [H] are attention sinks.
    """
    if plan is None or kv_cache is None:
        raise UnsupportedModel(
            f"{type(module).__name__} does not receive the keyword arguments of the model's forward, so it cannot "
            "attend over slots; choose a family that hands them to its attention"
        )
    layer: int = module.layer_idx  # type: ignore[assignment]
    keys, values = kv_cache.tensors(kv_cache.shared.get(layer, layer), key, value)
    if layer not in kv_cache.shared:
        keys.index_copy_(0, plan.write, key[0].transpose(0, 1))
        values.index_copy_(0, plan.write, value[0].transpose(0, 1))
    if sliding_window is not None:
        plan.windows.add(sliding_window)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    flat = query[0].transpose(0, 1)  # [T, H, D]
    output: Tensor | None = None
    for group in plan.groups:
        arguments = (flat, keys, values, group, scaling, sliding_window, softcap, s_aux)
        attended = _attend_group(*arguments, plan.in_fixed_order)
        if group.tokens is None:
            return attended[None], None
        if output is None:
            output = attended.new_empty(flat.shape[0], *attended.shape[1:])
        output[group.tokens] = attended
    assert output is not None, "a forward has at least one token"
    return output[None], None


def _attend_group(
    flat: Tensor,
    keys: Tensor,
    values: Tensor,
    group: Group,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    in_fixed_order: bool = False,
) -> Tensor:
    """flat [T, H, D] -> [T', H, Dv] of the group's real tokens."""
    batch, num_queries = group.shape
    attend_slots = kernel_for(flat, num_queries, in_fixed_order)
    if attend_slots is not None:
        seen = group.visibility
        places = (group.slots, seen.starts, seen.positions, seen.inside, group.rows, group.back)
        return attend_slots(flat, keys, values, *places, scaling, window or 0, softcap or 0.0, sinks, seen.firsts)
    queries = flat if group.rows is None else flat.index_select(0, group.rows.view(-1))
    queries = queries.unflatten(0, (batch, num_queries)).transpose(1, 2)  # [B, H, N, D]
    k, v = gather(keys, group.slots).transpose(1, 2), gather(values, group.slots).transpose(1, 2)  # [B, KV, S, D]
    if softcap is None and sinks is None:
        if group.is_causal and window is None:
            repeats = queries.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
            attended = F.scaled_dot_product_attention(queries, k, v, is_causal=True, scale=scaling)
        else:
            repeats = queries.shape[1] // k.shape[1]
            attended = attend(queries, k, v, group.mask(window, queries.dtype, repeats), scaling)
    else:
        attended = attend_by_hand(queries, k, v, group.mask(window, queries.dtype), scaling, softcap, sinks)
    attended = attended.transpose(1, 2).flatten(0, 1)  # [B * N, H, Dv]
    return attended if group.back is None else attended.index_select(0, group.back)


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """queries [B, H, N, D], keys [B, KV, S, D], values [B, KV, S, Dv], mask [B, 1, H / KV * N, S] -> [B, H, N, Dv].

    The heads that share keys are folded into the query length, which spares repeating keys and values.
    """
    batch, num_heads, num_queries, _ = queries.shape
    num_kv = keys.shape[1]
    folded = queries.reshape(batch, num_kv, num_heads // num_kv * num_queries, queries.shape[-1])
    attended = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scaling)
    return attended.reshape(batch, num_heads, num_queries, -1)


def attend_by_hand(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """As `attend`, for what scaled_dot_product_attention lacks: a softcap (Gemma 2) and sinks [H] (gpt-oss)."""
    batch, num_heads, num_queries, _ = queries.shape
    num_kv, num_keys = keys.shape[1], keys.shape[2]
    repeats = num_heads // num_kv
    folded = queries.reshape(batch, num_kv, repeats * num_queries, -1)
    scores = (folded @ keys.transpose(2, 3)).float() * scaling
    scores = scores.view(batch, num_kv, repeats, num_queries, num_keys)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores + mask[:, :, None]
    if sinks is not None:
        sink = sinks.float().view(1, num_kv, repeats, 1, 1).expand(batch, -1, -1, num_queries, 1)
        weights = torch.cat([scores, sink], -1).softmax(-1)[..., :num_keys]
    else:
        weights = scores.softmax(-1)
    attended = weights.to(values.dtype).view(batch, num_kv, repeats * num_queries, num_keys) @ values
    return attended.reshape(batch, num_heads, num_queries, -1)


# No mask function is registered: masks come with the plan, and transformers then builds none. For one that returns
# None it would first look for packed sequences, which on CUDA makes the host wait for the device in every forward.
AttentionInterface.register(NAME, slot_attention)
