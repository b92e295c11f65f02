"""A smaller language model draws the draft one token at a time (Leviathan et al. 2023; Chen et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.errors import InvalidConfiguration
from dspark.target.plan import View
from dspark.target.target import Target
from dspark.types import Draft, Request, Rule, Span


@dataclass
class Nodes:
    """What a model reads of B requests beyond the tokens that its cache holds of them: their draft, which grows.

    starts   (B)  tokens in the cache
    tokens   (B)  of one span, parents before children; `parents` are their places in it, -1 for the last cached token
    num_own       how many of them are no draft tokens: 1 where the anchor is not in the cache either
    """

    requests: Sequence[Request]
    starts: list[int]
    tokens: list[list[int]]
    parents: list[list[int]]
    num_own: int


class DraftModelDrafter:
    """Any causal LM with the target's vocabulary, over a slot cache of its own.

    length       draft tokens per step, each of them one pass; requests near the end of what the model can read get none,
                 nor do those that its cache has no room for until others have ended
    num_scratch  draft tokens of a request that are read in one step; None: what a chain needs
    """

    feature_layers: tuple[int, ...] = ()

    def __init__(self, model: Target, length: int = 4, num_scratch: int | None = None) -> None:
        if length < 1:
            raise InvalidConfiguration(f"length must be 1 or more; got {length}")
        self.model, self.length = model, length
        self._num_scratch = length - 1 if num_scratch is None else num_scratch

    def propose(self, requests: Sequence[Request], rule: Rule) -> Draft:
        able = self.able(requests)
        asked = [requests[b] for b in able]
        draft = _draw_chain(self.model, asked, rule, self._unread(asked), [len(r.tokens) for r in asked], self.length)
        return draft.among(able, len(requests))

    def able(self, requests: Sequence[Request]) -> list[int]:
        """Places of the requests whose whole draft has positions that the model knows, as many as its cache has room for.

        What the target's requests share by a prefix cache, this one holds for each.
        """
        places, num_free = [], self.model.num_free_slots
        for b in _within_context(self.model, requests, self.length):
            need = len(requests[b].tokens) - self.model.cache.length(requests[b].id) + self._num_scratch
            if need <= num_free:
                places.append(b)
                num_free -= need
        return places

    def begin(self, requests: Sequence[Request]) -> tuple[Nodes, Tensor]:
        """Read what was committed since the last call; logits [B, V] of each request's first draft token."""
        logits = self.model.extend(self._unread(requests)).logits
        starts = [len(r.tokens) for r in requests]
        return Nodes(requests, starts, [[] for _ in requests], [[] for _ in requests], num_own=0), logits

    def grow(self, growth: Nodes, tokens: Tensor, parents: Tensor) -> Tensor:
        """Read M more tokens per request: tokens, parents [B, M] (-1: the anchor) -> logits [B, M, V] of what follows."""
        return _grow(self.model, growth, tokens, parents)

    def release(self, request_id: int) -> None:
        self.model.release(request_id)

    def compile(self) -> None:
        """Compile the draft model's forwards."""
        self.model.compile()

    def _unread(self, requests: Sequence[Request]) -> list[Span]:
        """What the model has read is what its cache holds; it catches up on all that was committed since."""
        starts = [self.model.cache.length(r.id) for r in requests]
        return [Span(r.id, start, r.tokens[start:], num_logits=1) for r, start in zip(requests, starts, strict=True)]


class SelfDrafter:
    """The target's own first layers as the draft model, on the target's own cache, or on a view of it.

    Committed tokens need no second reading: verification has already written what the first layers need. The anchor and
    the draft are written while drafting and freed again before the target verifies them. With a view, attention in a
    draft step costs the same however long the context is (MagicDec, arXiv 2408.11049, over StreamingLLM's keys).

    num_layers  that draft; None: the first half
    length      draft tokens per step, each of them one pass through these layers
    view        what draft tokens see; None: everything
    """

    feature_layers: tuple[int, ...] = ()
    drafts_in_targets_slots = True

    def __init__(
        self, target: Target, num_layers: int | None = None, length: int = 4, view: View | None = None
    ) -> None:
        if length < 1:
            raise InvalidConfiguration(f"length must be 1 or more; got {length}")
        self.model = target.truncated(max(1, target.num_layers // 2) if num_layers is None else num_layers)
        if view is not None:
            self.model = self.model.seeing(view)
        self.length = length

    def propose(self, requests: Sequence[Request], rule: Rule) -> Draft:
        able = self.able(requests)
        asked = [requests[b] for b in able]
        draft = _draw_chain(self.model, asked, rule, self._anchors(asked), [r.num_cached for r in asked], self.length)
        return draft.among(able, len(requests))

    def able(self, requests: Sequence[Request]) -> list[int]:
        """Places of the requests whose whole draft has positions that the model knows."""
        return _within_context(self.model, requests, self.length)

    def begin(self, requests: Sequence[Request]) -> tuple[Nodes, Tensor]:
        """Read the anchors; logits [B, V] of each request's first draft token. The cache is left as it was, here and in `grow`."""
        logits = self.model.extend(self._anchors(requests)).logits
        starts = [r.num_cached for r in requests]
        for request in requests:
            self.model.keep(request.id, request.num_cached, [])
        return Nodes(requests, starts, [[*r.pending] for r in requests], [[-1] for _ in requests], num_own=1), logits

    def grow(self, growth: Nodes, tokens: Tensor, parents: Tensor) -> Tensor:
        """Read M more tokens per request: tokens, parents [B, M] (-1: the anchor) -> logits [B, M, V] of what follows."""
        return _grow(self.model, growth, tokens, parents)

    def release(self, request_id: int) -> None:
        pass  # the cache is the target's; the engine frees it

    def compile(self) -> None:
        """Compile the forwards of the first layers."""
        self.model.compile()

    def _anchors(self, requests: Sequence[Request]) -> list[Span]:
        if any(self.model.cache.length(r.id) != r.num_cached for r in requests):
            raise InvalidConfiguration(
                f"it was loaded for {self.model.name}, on whose cache it drafts, and the engine has another target: "
                "load_drafter(name, target) with that one"
            )
        return [Span(r.id, r.num_cached, r.pending, num_logits=1) for r in requests]


def _within_context(model: Target, requests: Sequence[Request], length: int) -> list[int]:
    """Rows of the requests whose whole draft has positions that the model knows."""
    return [b for b, r in enumerate(requests) if len(r.tokens) + length <= model.max_length]


def _grow(model: Target, growth: Nodes, tokens: Tensor, parents: Tensor) -> Tensor:
    """The nodes before are read again: only within one span can a token leave out what is no ancestor of it."""
    spans = []
    for b, (new, above) in enumerate(zip(tokens.tolist(), parents.tolist(), strict=True)):
        growth.tokens[b] += new
        growth.parents[b] += [parent + growth.num_own for parent in above]
        request_id, start = growth.requests[b].id, growth.starts[b]
        spans.append(Span(request_id, start, growth.tokens[b], growth.parents[b], num_logits=len(new)))
    logits = model.extend(spans).logits
    for span in spans:
        model.keep(span.request_id, span.start, [])
    return logits.unflatten(0, tuple(tokens.shape))


def _draw_chain(
    model: Target, requests: Sequence[Request], rule: Rule, spans: list[Span], keep_lengths: list[int], length: int
) -> Draft:
    """Read `spans`, then draw and read token after token; afterwards keep `keep_lengths` tokens per request in the cache."""
    if not requests:
        return Draft.empty(0)
    drawn: list[Tensor] = []
    laws: list[Tensor] = []
    paths: list[list[int]] = [[] for _ in requests]
    for _ in range(length):
        logits = model.extend(spans).logits
        tokens, law = rule.draft(logits, requests, paths)
        drawn.append(tokens)
        if law is not None:
            laws.append(law)
        spans = [
            Span(s.request_id, s.start + len(s.tokens), [token], num_logits=1)
            for s, token in zip(spans, tokens.tolist(), strict=True)
        ]
        paths = [[*path, int(s.tokens[0])] for path, s in zip(paths, spans, strict=True)]
    for request, kept in zip(requests, keep_lengths, strict=True):
        model.keep(request.id, kept, [])
    sizes = torch.full((len(requests),), length, dtype=torch.long)
    return Draft(torch.stack(drawn, 1), sizes, probs=torch.stack(laws, 1) if laws else None)
