"""The Triton kernel for attention over slots on GPU: many requests' queries against keys and values where they lie.

Two passes. The first cuts the keys of every request into splits and attends each on its own, so that a long context
occupies the whole GPU; the second adds the splits up in their order. Splits and tiles begin at fixed key numbers and
sums run in a fixed order, so a token gets the same bits alone, in a draft and beside other requests: as long as the
tiling is the same, which `attend_tuned` does not promise.

Import it only where Triton is installed; `kernels.load_triton` does.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspark.target import tilings
from dspark.target.native import attended_shape
from dspark.target.tilings import Shape, Tiling, geometry_of, tiling_for

_AT_ONCE = tl.constexpr(16)  # splits that the second pass adds at a time: fixed, because it is part of the order


@triton.jit
def _dot(a, b, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # its product of bfloat16 is one of their bit patterns
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit(do_not_specialize=["num_queries", "num_slots", "num_splits", "split"])
def _attend_splits(
    query,  # [T, H, D]
    keys,  # [slots, KV, D]
    values,  # [slots, KV, DV]
    slots,  # [B, S]
    starts,  # [B]
    positions,  # [B, N]
    inside,  # [B, N, N]; chains: not read
    rows,  # [B, N]; without: not read
    firsts,  # [B]; without: not read
    sums,  # [B * N, H, splits, DV] float32: weighted values, relative to the highest score
    tops,  # [B * N, H, splits] float32: highest score
    masses,  # [B * N, H, splits] float32: sum of weights
    scale,
    softcap,
    num_queries,
    num_slots,
    num_splits,
    split,
    window: tl.constexpr,  # 0: none
    H: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PADDED_D: tl.constexpr,
    PADDED_DV: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_INSIDE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_FIRSTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    GROUP: tl.constexpr = H // KV
    own_split, b = tl.program_id(0), tl.program_id(2)
    kv_head, tile = tl.program_id(1) % KV, tl.program_id(1) // KV
    row = tile * ROWS + tl.arange(0, ROWS)
    n, head = row // GROUP, kv_head * GROUP + row % GROUP
    is_real = n < num_queries
    padded = b * num_queries + n  # number of the query among the B * N
    source = padded
    if HAS_ROWS:
        # Padding repeats the span's first row: nobody will ask for those queries.
        source = tl.load(rows + padded, is_real, other=0)
        is_real = is_real & ((n == 0) | (source != tl.load(rows + b * num_queries)))
    start = tl.load(starts + b)
    position = tl.load(positions + padded, is_real, other=0)

    # Keys that any query of the tile can see.
    last = tl.max(tl.where(is_real, n, -1), 0)
    visible_end = start + num_queries
    if not HAS_INSIDE:
        visible_end = start + last + 1
    end = tl.minimum(tl.minimum(visible_end, num_slots), (own_split + 1) * split)
    first = own_split * split
    first_keys, num_hidden = 0, 0  # of the request's beginning, and those left out after them
    if HAS_FIRSTS:
        first_keys = tl.load(firsts + b)
        num_hidden = tl.load(positions + b * num_queries) - start
    if window > 0:
        oldest = tl.min(tl.where(is_real, position, 2147483647), 0)
        unseen = tl.maximum(tl.minimum(start, oldest - window + 1 - num_hidden), 0) // KEYS * KEYS
        first = tl.maximum(first, unseen)
    end = tl.where(last < 0, first, end)  # a tile of padding sees nothing

    d, dv = tl.arange(0, PADDED_D), tl.arange(0, PADDED_DV)
    q_offset = (source.to(tl.int64) * H + head)[:, None] * D + d[None, :]
    q = tl.load(query + q_offset, is_real[:, None] & (d < D)[None, :], other=0.0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, PADDED_DV], tl.float32)
    for offset in range(first, end, KEYS):
        key = offset + tl.arange(0, KEYS)
        exists = key < end
        slot = tl.load(slots + b.to(tl.int64) * num_slots + key, exists, other=0).to(tl.int64) * KV + kv_head
        k = tl.load(keys + slot[None, :] * D + d[:, None], exists[None, :] & (d < D)[:, None], other=0.0)
        scores = _dot(q, k, INTERPRETED) * scale
        if HAS_SOFTCAP:
            scores = softcap * (1.0 - 2.0 / (tl.exp(scores * (2.0 / softcap)) + 1.0))  # tanh
        within = (key - start)[None, :]
        seen = is_real[:, None] & exists[None, :]
        if HAS_INSIDE:
            cell = inside + padded.to(tl.int64)[:, None] * num_queries + within
            in_span = seen & (within >= 0) & (within < num_queries)
            seen = seen & ((within < 0) | (tl.load(cell, in_span, other=0) != 0))
        else:
            seen = seen & (within <= n[:, None])
        if window > 0:
            in_span = exists & (key >= start) & (key < start + num_queries)
            own = tl.load(positions + b * num_queries + key - start, in_span, other=0)
            cached = tl.where(key < first_keys, key, key + num_hidden)
            seen = seen & (position[:, None] - tl.where(key < start, cached, own)[None, :] < window)
        scores = tl.where(seen, scores, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, 1))
        finite = tl.where(highest > float("-inf"), highest, 0.0)  # a row that sees nothing yet
        shrink = tl.exp(top - finite)
        weights = tl.exp(scores - finite[:, None])
        mass = mass * shrink + tl.sum(weights, 1)
        v = tl.load(values + slot[:, None] * DV + dv[None, :], exists[:, None] & (dv < DV)[None, :], other=0.0)
        total = total * shrink[:, None] + _dot(weights.to(v.dtype), v, INTERPRETED)
        top = highest

    cell = (padded.to(tl.int64) * H + head) * num_splits + own_split
    tl.store(tops + cell, top, is_real)
    tl.store(masses + cell, mass, is_real)
    tl.store(sums + cell[:, None] * DV + dv[None, :], total, is_real[:, None] & (dv < DV)[None, :])


@triton.jit(do_not_specialize=["num_splits"])
def _add_splits(
    sums,
    tops,
    masses,
    back,  # [T']; without: not read
    sinks,  # [H]; without: not read
    output,  # [T', H, DV]
    num_splits,
    H: tl.constexpr,
    DV: tl.constexpr,
    PADDED_DV: tl.constexpr,
    HAS_BACK: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    padded = row
    if HAS_BACK:
        padded = tl.load(back + row)
    cell = (padded.to(tl.int64) * H + head) * num_splits
    dv = tl.arange(0, PADDED_DV)
    total = tl.zeros([PADDED_DV], tl.float32)
    top, mass = float("-inf"), 0.0
    if HAS_SINKS:
        top, mass = tl.load(sinks + head).to(tl.float32), 1.0
    for first in range(0, num_splits, _AT_ONCE):
        split = first + tl.arange(0, _AT_ONCE)
        exists = split < num_splits
        tops_here = tl.load(tops + cell + split, exists, other=float("-inf"))
        highest = tl.maximum(top, tl.max(tops_here, 0))
        finite = tl.where(highest > float("-inf"), highest, 0.0)
        shrink = tl.exp(top - finite)
        weights = tl.exp(tops_here - finite)  # 0 for a split that the row sees nothing of
        mass = mass * shrink + tl.sum(weights * tl.load(masses + cell + split, exists, other=0.0), 0)
        part = tl.load(
            sums + (cell + split)[:, None] * DV + dv[None, :], exists[:, None] & (dv < DV)[None, :], other=0.0
        )
        total = total * shrink + tl.sum(weights[:, None] * part, 0)
        top = highest
    tl.store(output + (row.to(tl.int64) * H + head) * DV + dv, (total / mass).to(output.dtype.element_ty), dv < DV)


@torch.library.custom_op("dspark::attend_slots_triton", mutates_args=())
def attend_slots(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    starts: Tensor,
    positions: Tensor,
    inside: Tensor | None,
    rows: Tensor | None,
    back: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    firsts: Tensor | None = None,
    tuned: bool = False,
) -> Tensor:
    """query [T, H, D], keys [slots, KV, D], values [slots, KV, Dv] -> [T', H, Dv]; the rest as in plan.Group.

    window 0, softcap 0 and sinks None mean none. tuned: as was fastest for such a batch, so its bits depend on the batch.
    One operator, so that torch.compile need not look inside.
    """
    (batch, num_queries), width = positions.shape, max(query.shape[2], values.shape[2])
    tiling = tiling_for(num_queries, width * query.element_size())
    if tuned:
        shape = Shape(batch, num_queries, slots.shape[1])
        tiling = tilings.fastest_known(geometry_of(query.shape[1], keys, values), shape) or tiling
    places = (slots, starts, positions, inside, rows, back)
    with torch.cuda.device_of(query):  # Triton launches on the current device, whatever its tensors lie on
        return attend_in(tiling, query, keys, values, *places, scale, window, softcap, sinks, firsts)


def attend_tuned(*arguments) -> Tensor:
    """attend_slots, cut as is fastest for such a batch (tilings.py)."""
    return attend_slots(*arguments, tuned=True)


def attend_in(
    tiling: Tiling,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    starts: Tensor,
    positions: Tensor,
    inside: Tensor | None,
    rows: Tensor | None,
    back: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    firsts: Tensor | None = None,
) -> Tensor:
    """attend_slots in tiles of that kind."""
    assert keys.is_contiguous() and values.is_contiguous(), "keys and values are rows of slots"
    query, slots, starts, positions = (x.contiguous() for x in (query, slots, starts, positions))
    batch, num_queries = positions.shape
    num_heads, num_kv, width, value_width = query.shape[1], keys.shape[1], query.shape[2], values.shape[2]
    split = tiling.split or triton.cdiv(slots.shape[1], tiling.keys) * tiling.keys
    num_splits = triton.cdiv(slots.shape[1], split)
    num_padded = batch * num_queries
    count = num_padded if back is None else back.shape[0]
    output = query.new_empty(count, num_heads, value_width)
    sums = query.new_empty(num_padded, num_heads, num_splits, value_width, dtype=torch.float32)
    tops, masses = query.new_empty(2, num_padded, num_heads, num_splits, dtype=torch.float32)
    num_tiles = triton.cdiv(num_queries * (num_heads // num_kv), tiling.rows)
    _attend_splits[(num_splits, num_kv * num_tiles, batch)](
        query,
        keys,
        values,
        slots,
        starts,
        positions,
        positions if inside is None else inside.contiguous().view(torch.uint8),
        positions if rows is None else rows.contiguous(),
        positions if firsts is None else firsts.contiguous(),
        sums,
        tops,
        masses,
        scale,
        softcap,
        num_queries,
        slots.shape[1],
        num_splits,
        split,
        window=window,
        H=num_heads,
        KV=num_kv,
        D=width,
        DV=value_width,
        PADDED_D=_padded(width),
        PADDED_DV=_padded(value_width),
        ROWS=tiling.rows,
        KEYS=tiling.keys,
        HAS_INSIDE=inside is not None,
        HAS_ROWS=rows is not None,
        HAS_FIRSTS=firsts is not None,
        HAS_SOFTCAP=softcap > 0,
        INTERPRETED=not query.is_cuda,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
    _add_splits[(count, num_heads)](
        sums,
        tops,
        masses,
        positions if back is None else back.contiguous(),
        tops if sinks is None else sinks.contiguous(),
        output,
        num_splits,
        H=num_heads,
        DV=value_width,
        PADDED_DV=_padded(value_width),
        HAS_BACK=back is not None,
        HAS_SINKS=sinks is not None,
        num_warps=2,
    )
    return output


def _padded(width: int) -> int:
    """A power of two, at least what tensor cores take."""
    return max(16, triton.next_power_of_2(width))


attend_slots.register_fake(attended_shape)
