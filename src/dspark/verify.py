"""The acceptance rule: the one place that decides what the user sees.

Both rules commit tokens distributed as the target's own, for chains and trees (design section 4):

* `Coupled`: every row of the target's forward commits argmax(log p + noise), where the noise depends on
  (seed, position) alone; a draft token is accepted iff it is that token. The text is a function of prompt, parameters
  and seed, whatever was drafted and however much of it was verified.
* `Rejection`: accept x with probability min(1, p(x)/q(x)), else draw from the residual (Leviathan et al. 2023, Chen et
  al. 2023; for siblings one after the other, SpecInfer). Lossless only if the scheduler does not anticipate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from dspark.errors import InvalidConfiguration
from dspark.noise import ACCEPT, COUPLED, DRAFT, RESIDUAL
from dspark.sampling import Draws, KeyedDraws, law, shape_logits
from dspark.transfer import columns_on_device, on_device
from dspark.types import Draft, Request, Rule, Verdict


class Coupled:
    """Draft and target draw with the same noise: a draft token is accepted iff it is what the target commits there."""

    allows_anticipation = True
    reports_chances = False  # noise that draft and target share decides: there is nothing to know but what happened
    draws_alike = True

    def __init__(self, draws: Draws) -> None:
        self.draws = draws

    def draft(
        self, logits: Tensor, requests: Sequence[Request], previous: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor | None]:
        scores, temperature = shape_logits(logits, requests, previous)
        positions = [len(r.tokens) + len(p) for r, p in zip(requests, previous, strict=True)]
        return self.draws.tokens(scores, temperature, [r.seed for r in requests], positions, COUPLED), None

    def noise_ahead(self, requests: Sequence[Request], length: int) -> Tensor | None:
        if not isinstance(self.draws, KeyedDraws) or any(r.params.reshapes for r in requests):
            return None
        noise = self.draws.noise
        if not any(r.params.temperature for r in requests):
            return noise.none
        seeds = [r.seed if r.params.temperature else None for r in requests for _ in range(length)]
        positions = [len(r.tokens) + k for r in requests for k in range(length)]
        rows = noise.rows(seeds, positions, COUPLED).view(len(requests), length, -1)
        return rows * on_device([r.params.temperature for r in requests], rows.device)[:, None, None]

    def outlook(self, logits: Tensor, requests: Sequence[Request], previous: Sequence[Sequence[int]]) -> Tensor:
        """The noise is the target's, so it decides here too: a softmax of what the draft's own choice is the largest of."""
        scores, temperature = shape_logits(logits, requests, previous)
        if isinstance(self.draws, KeyedDraws):
            positions = [len(r.tokens) + len(path) for r, path in zip(requests, previous, strict=True)]
            scores = self.draws.noisy(scores, temperature, [r.seed for r in requests], positions, COUPLED)
        return _log_law(scores, temperature)

    def verify(self, draft: Draft, keep: Tensor, logits: Tensor, requests: Sequence[Request]) -> Verdict:
        if logits.shape[0] == len(requests):  # nothing to judge
            return Verdict(keep, self._committed(logits, requests, [[]] * len(requests)).cpu())
        trees = [Tree(*columns) for columns in _columns(draft, keep)]
        owners = [r for r, tree in zip(requests, trees, strict=True) for _ in tree.rows]
        chosen = self._committed(logits, owners, [path for tree in trees for path in tree.paths]).tolist()

        accepted, next_tokens, first_row = [[False] * keep.shape[1] for _ in trees], list[int](), 0
        for tree, marks in zip(trees, accepted, strict=True):
            node, token = -1, chosen[first_row]
            while (child := tree.child(node, token)) is not None:
                marks[child] = True
                node, token = child, chosen[first_row + tree.rows[child]]
            next_tokens.append(token)
            first_row += len(tree.rows)
        marked = np.array(accepted, dtype=bool).reshape(keep.shape)
        return Verdict(torch.from_numpy(marked), torch.from_numpy(np.array(next_tokens)))

    def _committed(self, logits: Tensor, owners: Sequence[Request], previous: Sequence[Sequence[int]]) -> Tensor:
        """[R]  what every row commits if it is reached; owners and previous (R) as `shape_logits` takes them."""
        scores, temperature = shape_logits(logits, owners, previous)
        positions = [len(r.tokens) + len(path) for r, path in zip(owners, previous, strict=True)]
        return self.draws.tokens(scores, temperature, [r.seed for r in owners], positions, COUPLED)


class Rejection:
    """The paper's rule: accept x with probability min(1, p/q), else draw from the residual (Leviathan et al. 2023)."""

    allows_anticipation = False
    reports_chances = False
    draws_alike = False

    def __init__(self, draws: Draws) -> None:
        self.draws = draws

    def draft(
        self, logits: Tensor, requests: Sequence[Request], previous: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor | None]:
        """A path is drawn for once: asked again for a sibling, the same token comes. Siblings are picked outright."""
        scores, temperature = shape_logits(logits, requests, previous)
        # Each round has noise of its own, under a seed of its own. A position is drafted again in later rounds, and a
        # scheduler that goes by what earlier rounds drafted (section 5.2) would otherwise know the token it admits.
        seeds = [r.seed ^ len(r.tokens) << 32 for r in requests]
        tokens = self.draws.tokens(scores, temperature, seeds, [len(path) for path in previous], DRAFT)
        return tokens, law(scores.double(), temperature.double())

    def noise_ahead(self, requests: Sequence[Request], length: int) -> Tensor | None:
        return None  # the laws that drafts were drawn from are needed, too

    def outlook(self, logits: Tensor, requests: Sequence[Request], previous: Sequence[Sequence[int]]) -> Tensor:
        return _log_law(*shape_logits(logits, requests, previous))

    def verify(self, draft: Draft, keep: Tensor, logits: Tensor, requests: Sequence[Request]) -> Verdict:
        accepted, next_tokens, first_row = torch.zeros_like(keep), [], 0
        # Of siblings, who comes first has a say in the others' chances: only chains are reported.
        has_chances = self.reports_chances and draft.parents is None
        chances = torch.full(keep.shape, torch.nan, dtype=torch.double) if has_chances else None
        for b, (request, columns) in enumerate(zip(requests, _columns(draft, keep), strict=True)):
            tree = Tree(*columns)
            rows = logits[first_row : first_row + len(tree.rows)]
            scores, temperature = shape_logits(rows, [request] * len(tree.rows), tree.paths)
            # The residual is a difference of nearly equal numbers: double precision, on both sides, keeps it a law.
            target_law = law(scores.double(), temperature.double())
            draft_law = None if draft.probs is None else draft.probs[b].double()
            path, token = self._walk(tree, target_law, draft_law, request)
            accepted[b, path] = True
            if chances is not None:
                num_reached = min(len(path) + 1, len(tree.rows) - 1)
                chances[b, :num_reached] = _chances(target_law, draft_law, tree.tokens[:num_reached])
            next_tokens.append(token)
            first_row += len(tree.rows)
        return Verdict(accepted, torch.tensor(next_tokens), chances)

    def _walk(
        self, tree: Tree, target_law: Tensor, draft_law: Tensor | None, request: Request
    ) -> tuple[list[int], int]:
        """target_law [rows, V], draft_law [K, V] or None (picked outright): the accepted path and what follows it."""
        node, path = -1, list[int]()
        ratios = _ratios(tree, target_law, draft_law)
        while True:
            p, position = target_law[tree.rows[node]], len(request.tokens) + len(path)
            for ordinal, child in enumerate(tree.children(node)):
                token = tree.tokens[child]
                q = _all_on(token, p) if draft_law is None else draft_law[child]
                ratio = float(p[token] / q[token]) if ordinal else ratios[child]
                assert math.isfinite(ratio), "a draft token that its own law excludes"
                if self.draws.accepts(ratio, request.seed, position, ACCEPT + ordinal):
                    node = child
                    path.append(child)
                    break
                residual = (p - q).clamp_min(0)
                mass = residual.sum()
                p = torch.where(mass > 0, residual / mass, p)  # 0: p = q up to rounding
            else:
                one = torch.ones(1, 1, dtype=p.dtype, device=p.device)
                return path, int(self.draws.tokens(p.log()[None], one, [request.seed], [position], RESIDUAL))


class Tree:
    """The kept part of one request's draft: which row judges which token. A chain is a tree without siblings."""

    def __init__(self, tokens: list[int], parents: list[int], keep: list[bool]) -> None:
        self.tokens, self.parents = tokens, parents
        self.rows = {-1: 0}  # node -> its row among the request's rows; the anchor is node -1
        self.paths: list[list[int]] = [[]]  # per row: draft tokens from the anchor to the node, itself included
        for node, kept in enumerate(keep):
            if kept:
                assert parents[node] in self.rows, "a kept draft token whose parent is not kept"
                self.rows[node] = len(self.paths)
                self.paths.append([*self.paths[self.rows[parents[node]]], tokens[node]])

    def children(self, node: int) -> Iterator[int]:
        """Kept draft tokens after `node`, in the order of the draft; -1 is the anchor."""
        for child in range(node + 1, len(self.parents)):  # of a chain, the first
            if self.parents[child] == node and child in self.rows:
                yield child

    def child(self, node: int, token: int) -> int | None:
        """The kept draft token `token` after `node`; None: there is none."""
        for child in self.children(node):
            if self.tokens[child] == token:
                return child
        return None


RULES: dict[str, type[Coupled] | type[Rejection]] = {"coupled": Coupled, "rejection": Rejection}


def make_rule(name: str, draws: Draws) -> Rule:
    """The rule of this name: `coupled` or `rejection`."""
    if name not in RULES:
        raise InvalidConfiguration(f"rule must be one of {', '.join(RULES)}; got {name!r}")
    return RULES[name](draws)


def _log_law(scores: Tensor, temperature: Tensor) -> Tensor:
    """Temperature 0 keeps the scores as they are: the one-hot limit would leave no second choice."""
    return torch.log_softmax(scores / torch.where(temperature > 0, temperature, 1.0), -1)


def _chances(target_law: Tensor, draft_law: Tensor | None, tokens: list[int]) -> Tensor:
    """[n]  of a chain's first tokens: what both laws have in common, 1 less their total variation."""
    judges = target_law[: len(tokens)]
    if draft_law is None:  # picked outright
        return judges.gather(1, torch.tensor(tokens, dtype=torch.long, device=judges.device)[:, None])[:, 0].cpu()
    return torch.minimum(judges, draft_law[: len(tokens)]).sum(-1).cpu()


def _ratios(tree: Tree, target_law: Tensor, draft_law: Tensor | None) -> dict[int, float]:
    """Of every kept node p / q, for when no sibling was tried before it: all in one copy, for which the host waits."""
    nodes = [node for node in tree.rows if node >= 0]
    if not nodes:
        return {}
    numbers = [nodes, [tree.rows[tree.parents[node]] for node in nodes], [tree.tokens[node] for node in nodes]]
    places, rows, tokens = columns_on_device(numbers, target_law.device)
    p = target_law[rows, tokens]
    return dict(zip(nodes, (p if draft_law is None else p / draft_law[places, tokens]).tolist(), strict=True))


def _all_on(token: int, like: Tensor) -> Tensor:
    return torch.zeros_like(like).index_fill_(0, on_device([token], like.device), 1.0)


def _columns(draft: Draft, keep: Tensor) -> list[tuple[list[int], list[int], list[bool]]]:
    num_requests, length = draft.tokens.shape
    chain = list(range(-1, length - 1))
    parents = [chain] * num_requests if draft.parents is None else draft.parents.tolist()
    return list(zip(draft.tokens.tolist(), parents, keep.tolist(), strict=True))
