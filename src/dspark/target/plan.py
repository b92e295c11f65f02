"""What one forward over many requests needs besides the weights: which token goes where and who sees whom.

Built once per forward on the host, shared by all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dspark.errors import InvalidConfiguration
from dspark.target.kv_cache import KVCache
from dspark.transfer import together_on_device
from dspark.types import Span

SHORT = 16  # spans up to this many tokens are padded to a common length and attended in one batch


@dataclass(frozen=True)
class View:
    """What a span sees of its request: its first tokens and its last ones, the span's own among these (StreamingLLM).

    Keys stay as they lie, rotated for their absolute positions.
    """

    num_first: int
    num_last: int

    def num_before(self, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """[B]  cached tokens that spans of `sizes` tokens after `starts` cached ones see."""
        return np.minimum(starts, self.num_first + np.maximum(self.num_last - sizes, 0))


@dataclass
class Visibility:
    """Who sees whom in B spans of up to N tokens over up to S keys each. Spans' own tokens are their last keys.

    starts     [B]        keys before the span: all visible
    positions  [B, N]     position of each query; a span's first is where it begins
    inside     [B, N, N]  inside[b, i, j]: token i of the span sees its token j; None: a chain
    num_keys              S
    firsts     [B]        keys that begin the request: those that a view leaves out come after them. None: it has all
    """

    starts: Tensor
    positions: Tensor
    inside: Tensor | None
    num_keys: int
    firsts: Tensor | None = None

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[B, 1, N, S]  0 where visible and -inf elsewhere; a window counts positions, so it also holds for trees."""
        batch, num_queries = self.positions.shape
        index = torch.arange(self.num_keys, device=self.starts.device)
        relative = index - self.starts[:, None]  # [B, S]  index within the span; negative: cached before it
        key_positions = index[None]
        if self.firsts is not None:
            num_hidden = self.positions[:, :1] - self.starts[:, None]
            key_positions = torch.where(index < self.firsts[:, None], index, index + num_hidden)
        if self.inside is None:
            visible = relative[:, None] <= torch.arange(num_queries, device=index.device)[:, None]
        else:
            within = relative.clamp(0, num_queries - 1)
            seen = self.inside.gather(2, within[:, None].expand(batch, num_queries, self.num_keys))
            visible = (relative < 0)[:, None] | (seen & (relative < num_queries)[:, None])
            key_positions = torch.where(relative < 0, key_positions, self.positions.gather(1, within))
        if window is not None:
            visible = visible & (self.positions[:, :, None] - key_positions[:, None] < window)
        return torch.zeros((), dtype=dtype, device=index.device).masked_fill(~visible, float("-inf"))[:, None]


@dataclass
class Group:
    """Spans that are attended in one padded batch.

    rows   [B, N]  row of the forward that each query is; padding repeats the span's first. None: all, in order
    back   [T']    of the B * N padded queries, the real ones, in the order of `tokens`
    tokens [T']    their rows of the forward; None: all of them, in order
    slots  [B, S]  slots of the keys; padding repeats the span's own first slot, because unused slots may hold NaN
    """

    slots: Tensor
    visibility: Visibility
    rows: Tensor | None = None
    back: Tensor | None = None
    tokens: Tensor | None = None
    sees_all: bool = False  # every query sees every key, as far as there is no window
    is_causal: bool = False  # the keys are the span itself and it is a chain
    masks: dict[tuple[int | None, int], Tensor | None] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """Requests, and queries of each."""
        return self.visibility.positions.shape[0], self.visibility.positions.shape[1]

    def mask(self, window: int | None, dtype: torch.dtype, repeats: int = 1) -> Tensor | None:
        """[B, 1, repeats * N, S] as Visibility.mask, or None where everything is visible; made once per forward."""
        key = (window, repeats)
        if key not in self.masks:
            mask = None if self.sees_all and window is None else self.visibility.mask(window, dtype)
            self.masks[key] = mask if mask is None or repeats == 1 else mask.repeat(1, 1, repeats, 1)
        return self.masks[key]


@dataclass
class Plan:
    """One forward: T tokens, their slots, and the groups in which they are attended.

    write [T]       slot that each token's keys and values go to
    windows         sliding windows that layers asked for
    is_for_graph    one group of short spans, with all the arrays that the compiled graphs take
    in_fixed_order  a token's sums must not depend on the batch
    """

    write: Tensor
    groups: list[Group]
    is_for_graph: bool = False
    in_fixed_order: bool = False
    windows: set[int] = field(default_factory=set)


class Inputs(NamedTuple):
    """One forward on the host: token_ids [T], positions [T], write [T] (slots), logit_rows [R], and how spans group."""

    token_ids: np.ndarray
    positions: np.ndarray
    write: np.ndarray
    logit_rows: np.ndarray
    groups: list[list[int]]  # indices of the spans
    offsets: list[int]  # first row of each span


def positions_of(span: Span) -> np.ndarray:
    """[n]  absolute positions of a span's tokens: by depth in a tree, one after another otherwise."""
    if span.parents is None or span.is_block:
        return np.arange(span.start, span.start + len(span.tokens))
    depths: list[int] = []
    for parent in span.parents:
        depths.append(span.start if parent < 0 else depths[parent] + 1)
    return np.array(depths)


def inside_of(span: Span, width: int) -> np.ndarray:
    """[n, width]  which tokens of the span each of its tokens sees."""
    n = len(span.tokens)
    inside = np.zeros((n, width), dtype=bool)
    if span.is_block:
        inside[:, :n] = True
    elif span.parents is None:
        inside[:, :n] = np.tri(n, dtype=bool)
    else:
        for i, parent in enumerate(span.parents):
            if parent >= 0:
                inside[i] = inside[parent]
            inside[i, i] = True
    return inside


def read_spans(spans: Sequence[Span], write: np.ndarray) -> Inputs:
    """Lay the tokens of all spans one after another and group the spans: the short ones together, long ones alone."""
    token_ids: list[int] = []
    offsets: list[int] = []
    logit_rows: list[int] = []
    positions: list[np.ndarray] = []
    short: list[int] = []
    groups: list[list[int]] = []
    for b, span in enumerate(spans):
        offsets.append(len(token_ids))
        token_ids.extend(span.tokens)
        positions.append(positions_of(span))
        logit_rows.extend(range(len(token_ids) - span.num_logits, len(token_ids)))
        if len(span.tokens) <= SHORT:
            short.append(b)
        else:
            groups.append([b])
    if short:
        groups.insert(0, short)
    flat = positions[0] if len(positions) == 1 else np.concatenate(positions)
    return Inputs(np.array(token_ids), flat, write, np.array(logit_rows, dtype=np.int64), groups, offsets)


def in_short_pieces(spans: Sequence[Span]) -> list[Span]:
    """The same tokens, but of long chains, which are cut into short ones that come one after another."""
    pieces: list[Span] = []
    for span in spans:
        num_tokens = len(span.tokens)
        if num_tokens <= SHORT or not span.is_chain:
            pieces.append(span)
            continue
        for first in range(0, num_tokens, SHORT):
            tokens = span.tokens[first : first + SHORT]
            num_after = num_tokens - first - len(tokens)
            num_logits = min(max(span.num_logits - num_after, 0), len(tokens))
            pieces.append(Span(span.request_id, span.start + first, tokens, num_logits=num_logits))
    return pieces


def refuse_trees(spans: Sequence[Span]) -> None:
    """What a token of a tree sees lies at other places than it would in a chain, so its sums would differ."""
    if not all(span.is_chain for span in spans):
        raise InvalidConfiguration(
            "a deterministic target reads chains of tokens; a tree was drafted: use a drafter without tree, or a "
            "target that is not deterministic"
        )


def make_plan(
    spans: Sequence[Span],
    inputs: Inputs,
    cache: KVCache,
    for_graph: bool = False,
    view: View | None = None,
) -> Plan:
    """The plan on the host. for_graph: a graph will run this if it can, so leave nothing out that it takes."""
    for_graph = for_graph and len(inputs.groups) == 1 and all(len(span.tokens) <= SHORT for span in spans)
    groups = [_plan_group(spans, inputs, members, cache, for_graph, view) for members in inputs.groups]
    is_for_graph = for_graph and groups[0].slots.shape[1] > 1
    return Plan(torch.from_numpy(inputs.write), groups, is_for_graph)


def move(plan: Plan, tensors: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """Bring a plan to the device, and with it tensors: all in one copy."""
    if device.type == "cpu":
        return tensors
    places: list[tuple[Any, str]] = [(plan, "write")]
    for group in plan.groups:
        places += [(group, name) for name in ("slots", "rows", "back", "tokens")]
        places += [(group.visibility, name) for name in ("starts", "positions", "inside", "firsts")]
    places = [(owner, name) for owner, name in places if getattr(owner, name) is not None]
    moved = together_on_device([*tensors, *(getattr(owner, name) for owner, name in places)], device)
    for (owner, name), tensor in zip(places, moved[len(tensors) :], strict=True):
        setattr(owner, name, tensor)
    return moved[: len(tensors)]


def _plan_group(
    spans: Sequence[Span], inputs: Inputs, members: list[int], cache: KVCache, for_graph: bool, view: View | None
) -> Group:
    starts = np.array([spans[b].start for b in members])
    sizes = np.array([len(spans[b].tokens) for b in members])
    firsts = None
    if view is not None:
        starts = view.num_before(starts, sizes)
    if view is not None or for_graph:
        firsts = torch.full((len(members),), 0 if view is None else view.num_first)
    is_alone = len(members) == 1
    num_queries, num_keys = int(sizes.max()), int((starts + sizes).max())
    if for_graph and not is_alone:
        num_queries = max(num_queries, 2)
    steps = np.arange(num_queries)
    is_real = steps < sizes[:, None]
    offsets = np.array([inputs.offsets[b] for b in members])
    rows = offsets[:, None] + np.where(is_real, steps, 0)
    covers_all = int(sizes.sum()) == len(inputs.token_ids)
    in_order = bool(is_real.all()) and (is_alone or not for_graph)
    is_chain = all(spans[b].is_chain for b in members)

    needs_inside = not is_chain or (for_graph and num_queries > 1)
    inside = None
    if needs_inside:
        inside = torch.from_numpy(_chains(is_real) if is_chain else _inside(spans, members, num_queries))
    return Group(
        slots=torch.from_numpy(_slots(spans, members, starts, num_keys, cache, view)),
        visibility=Visibility(
            torch.from_numpy(starts), torch.from_numpy(inputs.positions[rows]), inside, num_keys, firsts
        ),
        rows=None if covers_all and in_order else torch.from_numpy(rows),
        back=None if in_order else torch.from_numpy(np.flatnonzero(is_real)),
        tokens=None if covers_all else torch.from_numpy(rows[is_real]),
        sees_all=is_alone and (num_queries == 1 or spans[members[0]].is_block),
        is_causal=is_alone and is_chain and starts[0] == 0 and num_queries > 1,
    )


def _chains(is_real: np.ndarray) -> np.ndarray:
    """[B, N, N]  as `_inside` where every span is a chain, from which queries [B, N] are real."""
    inside = np.tri(is_real.shape[1], dtype=bool) & is_real[:, :, None]
    inside[:, :, 0] = True
    return inside


def _inside(spans: Sequence[Span], members: list[int], num_queries: int) -> np.ndarray:
    """[B, N, N]  who sees whom within each span; a padded query sees the first token, or its softmax were NaN."""
    inside = np.zeros((len(members), num_queries, num_queries), dtype=bool)
    inside[:, :, 0] = True
    for i, b in enumerate(members):
        inside[i, : len(spans[b].tokens)] = inside_of(spans[b], num_queries)
    return inside


def _slots(
    spans: Sequence[Span], members: list[int], starts: np.ndarray, num_keys: int, cache: KVCache, view: View | None
) -> np.ndarray:
    """[B, S]  slots that each span sees, padded with the first one that it writes."""
    seen: list[np.ndarray] = []
    for b, start in zip(members, starts.tolist(), strict=True):
        span, owned = spans[b], cache.slots_of(spans[b].request_id)
        if view is not None and start < span.start:
            owned = np.concatenate([owned[: view.num_first], owned[view.num_first + span.start - start :]])
        seen.append(owned[: start + len(span.tokens)])
    if len(members) == 1:
        return seen[0][None]
    slots = np.empty((len(members), num_keys), dtype=np.int64)
    for row, own, start in zip(slots, seen, starts.tolist(), strict=True):
        row[: len(own)], row[len(own) :] = own, own[start]
    return slots
