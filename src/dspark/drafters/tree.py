"""Dynamic trees (EAGLE-2, Li et al. 2024): where a chain drafter is in doubt, its second and third guess are drafted too.

Layer by layer the likeliest nodes are read and their likeliest followers become candidates; of all candidates those
with the largest product of likelihoods along their path go to the target. A node is never likelier than its parent, so
that choice is closed under ancestors, and what a scheduler cuts off by survival is a smaller such tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dspark.errors import InvalidConfiguration
from dspark.types import Draft, Request, Rule


class Grower(Protocol):
    """A drafter that can go on from any node of its draft. Nodes are numbered in the order in which they were read.

    length  the deepest a draft can be
    """

    feature_layers: tuple[int, ...]
    length: int

    def able(self, requests: Sequence[Request]) -> list[int]:
        """Places of the requests that it can draft for."""
        ...

    def begin(self, requests: Sequence[Request]) -> tuple[Any, Tensor]:
        """Catch up and read the anchors: the growth so far, and logits [B, V] of what follows each anchor."""
        ...

    def grow(self, growth: Any, tokens: Tensor, parents: Tensor) -> Tensor:
        """Read M more nodes per request, tokens and parents [B, M] (-1: the anchor): logits [B, M, V] of what follows."""
        ...

    def release(self, request_id: int) -> None: ...


@dataclass(frozen=True)
class Layer:
    """Candidates of one depth, W children in a row for each node that was read.

    tokens  [B, C]
    own     [B, C]  log-likelihood of each, given its ancestors
    score   [B, C]  of the whole path
    parent  [B, C]  number of the parent among all candidates; -1 for the anchor
    above   [B, C]  number of the parent among the nodes that were read; -1 for the anchor
    """

    tokens: Tensor
    own: Tensor
    score: Tensor
    parent: Tensor
    above: Tensor


class TreeDrafter:
    """Drafts `size` tokens as the likeliest tree that a grower knows.

    size    draft tokens per step
    width   nodes read per layer, and followers considered of each
    length  `size`, or as many slots as drafting itself takes where they are the target's

    Tokens are picked, not drawn, so a confidence may depend on its own token: under the coupled rule it is the likelihood
    once the noise is known, under the rejection rule, which sees siblings as picked outright, the drafter's own.
    """

    def __init__(self, grower: Grower, size: int, width: int = 4) -> None:
        if width < 1:
            raise InvalidConfiguration(f"width must be 1 or more; got {width}")
        most = width + (grower.length - 1) * width * width
        if not 1 <= size <= most:
            raise InvalidConfiguration(
                f"a tree of width {width} and depth {grower.length} has 1 to {most} tokens; got size {size}"
            )
        self.grower, self.size, self.width = grower, size, width
        num_read = width * (grower.length - 1) if getattr(grower, "drafts_in_targets_slots", False) else 0
        self.length = max(size, num_read)
        self.feature_layers = grower.feature_layers

    @torch.no_grad()
    def propose(self, requests: Sequence[Request], rule: Rule) -> Draft:
        able = self.grower.able(requests)
        asked = [requests[b] for b in able]
        if not asked:
            return Draft.empty(len(requests))
        growth, logits = self.grower.begin(asked)
        paths: list[list[list[int]]] = [[[]] for _ in asked]
        own, tokens = self._followers(rule, asked, logits[:, None], paths)
        nothing = torch.full_like(tokens[:, 0], -1)
        layers = [Layer(tokens[:, 0], own[:, 0], own[:, 0], nothing, nothing)]
        num_before = num_read = 0
        while len(layers) < self.grower.length:
            last = layers[-1]
            score, best = last.score.topk(self.width)
            read = last.tokens.gather(1, best)
            logits = self.grower.grow(growth, read, last.above.gather(1, best))
            paths = _extended(paths, best // self.width, read, asked)
            own, tokens = self._followers(rule, asked, logits, paths)
            numbers = num_read + torch.arange(self.width, device=best.device).expand_as(best)
            layers.append(
                Layer(
                    tokens=tokens.flatten(1),
                    own=own.flatten(1),
                    score=(score[..., None] + own).flatten(1),
                    parent=(num_before + best).repeat_interleave(self.width, 1),
                    above=numbers.repeat_interleave(self.width, 1),
                )
            )
            num_before += last.tokens.shape[1]
            num_read += self.width
        return _likeliest(layers, self.size).among(able, len(requests))

    def release(self, request_id: int) -> None:
        self.grower.release(request_id)

    def _followers(
        self, rule: Rule, requests: Sequence[Request], logits: Tensor, paths: list[list[list[int]]]
    ) -> tuple[Tensor, Tensor]:
        """Log-likelihoods and tokens [B, M, W] of the likeliest followers of nodes with logits [B, M, V] and these paths."""
        owners = [r for r, ends in zip(requests, paths, strict=True) for _ in ends]
        likelihood = rule.outlook(logits.flatten(0, 1), owners, [path for ends in paths for path in ends])
        found = likelihood.unflatten(0, logits.shape[:2]).topk(self.width)
        # Where a grammar excludes all that the drafter knows, there is no law: no numbers, which would be sorted first.
        return found.values.masked_fill(found.values.isnan(), float("-inf")), found.indices


def _extended(
    paths: list[list[list[int]]], parents: Tensor, tokens: Tensor, requests: Sequence[Request]
) -> list[list[list[int]]]:
    """Of each request the paths of M nodes: tokens, parents [B, M], the latter among `paths`. As sampling.extended has
    it, who they are is asked by few."""
    if tokens.device.type != "cpu" and not any(r.looks_back for r in requests):
        return [[[*ends[0], 0]] * tokens.shape[1] for ends in paths]
    numbers = torch.stack([parents, tokens], 2).tolist()
    return [[[*ends[b], token] for b, token in row] for ends, row in zip(paths, numbers, strict=True)]


def _likeliest(layers: list[Layer], size: int) -> Draft:
    """The `size` candidates of the best paths as a draft, parents before children."""
    score, parent = (torch.cat([getattr(layer, name) for layer in layers], 1) for name in ("score", "parent"))
    # Parents come first among equals too: they are numbered before their children, and the sort is stable.
    order = score.sort(dim=1, descending=True, stable=True).indices[:, :size]
    place = torch.full_like(parent, -1).scatter_(1, order, torch.arange(size, device=order.device).expand_as(order))
    above = parent.gather(1, order)
    parents = torch.where(above < 0, above, place.gather(1, above.clamp(min=0)))
    tokens, own = (torch.cat([getattr(layer, n) for layer in layers], 1).gather(1, order) for n in ("tokens", "own"))
    # What a grammar or a cut excludes cannot be drafted.
    sizes = (score.gather(1, order) > float("-inf")).sum(1)
    return Draft(tokens, sizes, confidence=own.exp(), parents=parents)
