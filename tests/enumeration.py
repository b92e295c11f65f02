"""Exact laws of the production code: its randomness is injected, every branch is taken, probabilities are multiplied.

`law_of(function)` runs `function(draws)` once per branch and returns {outcome: probability} in double precision.
`decode_law(...)` does so for whole decoding loops over a toy target whose law is a table over prefixes;
`target_law(...)` is what they must equal, written in plain Python from the definitions of the sampling parameters.
"""

from __future__ import annotations

import ctypes
import math
import random
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from dspark.budget.prefix_scheduler import falling_survival
from dspark.budget.raw_beliefs import RawBeliefs
from dspark.sampling import Draws
from dspark.types import Draft, Drafter, Load, PrefixScheduler, Request, Rule, SamplingParams

Law = dict[Hashable, float]
Table = Callable[[tuple[int, ...]], tuple[float, ...]]  # logits after a sequence of tokens
_SLIVER = 1e-15  # intervals of this width come from rounding


class Branches:
    """`Draws` that follow one branch of all that randomness could do, and note the ones not taken.

    With `keyed`, what production relies on is modelled exactly: everything drawn under one (seed, position, stream) is
    a function of one uniform number, asked for as often as the code likes (tokens by inverting the cumulative law, so
    the same law gives the same token). Only an interval is known of each number, and it splits where the code can tell.
    Without it, every draw is independent.
    """

    def __init__(self, taken: Sequence[int], keyed: bool) -> None:
        self.taken, self.keyed = list(taken), keyed
        self.depth, self.probability = 0, 1.0
        self.untaken: list[list[int]] = []
        self._interval: dict[Hashable, tuple[float, float]] = {}

    def tokens(
        self, scores: Tensor, temperature: Tensor, seeds: Sequence[int], positions: Sequence[int], stream: int
    ) -> Tensor:
        assert len(scores) == len(temperature) == len(seeds) == len(positions)
        keys = [(seed, position, stream) for seed, position in zip(seeds, positions, strict=True)]
        laws = map(softmax, scores.tolist(), temperature[:, 0].tolist())
        return torch.tensor([self._draw(law, key) for law, key in zip(laws, keys, strict=True)], dtype=torch.long)

    def accepts(self, probability: float, seed: int, position: int, stream: int) -> bool:
        return self._draw([min(probability, 1.0), max(1.0 - probability, 0.0)], (seed, position, stream)) == 0

    def _draw(self, law: Sequence[float], key: Hashable) -> int:
        low, high = self._interval.get(key, (0.0, 1.0))
        edges = [0.0, *accumulate(law)]
        edges[-1] = 1.0
        pieces = [(max(low, a), min(high, b)) for a, b in pairwise(edges)]
        weights = [max(0.0, b - a) / (high - low) for a, b in pieces]
        options = [i for i, (a, b) in enumerate(pieces) if b - a > _SLIVER and law[i] > 0]
        if not options:  # all that is left is rounding
            options = [max(range(len(law)), key=weights.__getitem__)]
        if self.depth < len(self.taken):
            choice = self.taken[self.depth]
        else:
            choice = options[0]
            self.untaken += [[*self.taken, other] for other in options[1:]]
            self.taken.append(choice)
        self.depth += 1
        self.probability *= weights[choice]
        if self.keyed:
            self._interval[key] = pieces[choice]
        return choice


def law_of(function: Callable[[Draws], Hashable], keyed: bool = True) -> Law:
    """{outcome: probability} of a function of randomness."""
    law: Law = defaultdict(float)
    todo: list[list[int]] = [[]]
    while todo:
        draws = Branches(todo.pop(), keyed)
        law[function(draws)] += draws.probability
        todo += draws.untaken
    return dict(law)


def distance(left: Law, right: Law) -> float:
    """The largest difference between two laws at any outcome."""
    return max(abs(left.get(outcome, 0.0) - right.get(outcome, 0.0)) for outcome in {*left, *right})


def softmax(scores: Sequence[float], temperature: float) -> list[float]:
    """The definition, in double precision; temperature 0 is all on the first of the largest scores."""
    top = max(scores)
    if temperature == 0:
        return [float(i == scores.index(top)) for i in range(len(scores))]
    weights = [math.exp((score - top) / temperature) for score in scores]
    return [weight / sum(weights) for weight in weights]


def logits_of(probabilities: Sequence[float]) -> tuple[float, ...]:
    """Logits of about these probabilities, exact in single precision and under the penalties of the tests."""
    return tuple(round(math.log(p) * 64) / 64 if p > 0 else -math.inf for p in probabilities)


def random_table(seed: int, vocab_size: int = 3, num_zeros: int = 0, sharpness: float = 1.0) -> Table:
    """A law after every prefix, drawn from a Dirichlet, num_zeros tokens impossible each time."""

    @cache
    def logits(prefix: tuple[int, ...]) -> tuple[float, ...]:
        rng = random.Random(f"{seed} {prefix}")
        weights = [rng.gammavariate(sharpness, 1.0) for _ in range(vocab_size)]
        for token in rng.sample(range(vocab_size), num_zeros):
            weights[token] = 0.0
        return logits_of([max(w, 1e-3 * (w > 0)) / sum(weights) for w in weights])

    return logits


CHAIN = (-1, 0)
TREE = (-1, -1, 0, 0, 1, 1)


@dataclass
class TableDrafter:
    """Draws with `rule.draft`, or picks outright, after every node of a tree of this shape; its laws are a table.

    pick(logits, ordinal)       a token for the ordinal-th node of its parent; None: leave it to the rule
    confidence(tokens, token)   of drawing this token after all these, the request's own among them
    """

    table: Table
    parents: tuple[int, ...] = CHAIN
    pick: Callable[[Sequence[float], int], int | None] = lambda logits, ordinal: None
    confidence: Callable[[tuple[int, ...], int], float] | None = None
    feature_layers: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        return len(self.parents)

    def propose(self, requests: Sequence[Request], rule: Rule) -> Draft:
        paths: list[dict[int, tuple[int, ...]]] = [{-1: ()} for _ in requests]
        confidence = torch.zeros(len(requests), self.length)
        laws: list[Tensor] = []
        for k, parent in enumerate(self.parents):
            ordinal = self.parents[:k].count(parent)
            before = [(*r.tokens, *path[parent]) for r, path in zip(requests, paths, strict=True)]
            logits = [self.table(tokens) for tokens in before]
            picks = [self.pick(row, ordinal) for row in logits]
            if None in picks:
                previous = [path[parent] for path in paths]
                drawn, law = rule.draft(torch.tensor(logits), requests, previous)
                laws += [] if law is None else [law]
                picks = drawn.tolist()
            for b, token in enumerate(picks):
                assert token is not None
                paths[b][k] = (*paths[b][parent], token)
                confidence[b, k] = self.confidence(before[b], token) if self.confidence else 0.0
        tokens = torch.tensor([[path[k][-1] for k in range(self.length)] for path in paths]).view(len(requests), -1)
        sizes = torch.full((len(requests),), self.length)
        is_chain = self.parents == tuple(range(-1, self.length - 1))
        parents = None if is_chain else torch.tensor([self.parents] * len(requests))
        probs = torch.stack(laws, 1) if laws else None
        return Draft(tokens, sizes, confidence if self.confidence else None, parents, probs)

    def release(self, request_id: int) -> None:
        pass


def decode_law(
    make_rule: Callable[[Draws], Rule],
    drafter: Drafter,
    scheduler: PrefixScheduler,
    target: Table,
    num_tokens: int,
    params: SamplingParams | None = None,
    num_requests: int = 1,
    loop: bool = False,
    keyed: bool = True,
) -> Law:
    """Joint law of the first num_tokens tokens of each request, decoded as the engine does; the rest is cut off.

    Rounds depend on each other through the committed tokens alone, so each is enumerated once per state. `loop` runs
    all rounds under the same randomness instead: slower, and it sees noise that is used again in a later round.
    """
    params = params or SamplingParams()

    def advance(state: tuple[tuple[int, ...], ...], draws: Draws) -> tuple[tuple[int, ...], ...]:
        running = [
            Request(b, [b, *output], params, num_prompt_tokens=1, seed=b)
            for b, output in enumerate(state)
            if len(output) < num_tokens
        ]
        committed = step(running, drafter, scheduler, make_rule(draws), target)
        outputs = list(state)
        for request, tokens in zip(running, committed, strict=True):
            outputs[request.id] = (*state[request.id], *tokens)[:num_tokens]
        return tuple(outputs)

    def decode(draws: Draws) -> Hashable:
        state: tuple[tuple[int, ...], ...] = ((),) * num_requests
        while any(len(output) < num_tokens for output in state):
            state = advance(state, draws)
        return state

    if loop:
        return law_of(decode, keyed)
    law: Law = {}
    ahead: dict[tuple[tuple[int, ...], ...], float] = {((),) * num_requests: 1.0}
    while ahead:
        state = min(ahead, key=lambda outputs: sum(map(len, outputs)))
        probability = ahead.pop(state)
        for outcome, share in law_of(lambda draws, state=state: advance(state, draws), keyed).items():
            todo = law if all(len(output) == num_tokens for output in outcome) else ahead
            todo[outcome] = todo.get(outcome, 0.0) + probability * share
    return law


def step(
    requests: Sequence[Request], drafter: Drafter, scheduler: PrefixScheduler, rule: Rule, target: Table
) -> list[list[int]]:
    """One round as the engine runs it: the tokens to commit for each request."""
    draft = drafter.propose(requests, rule)
    survival = falling_survival(draft, RawBeliefs().survival(draft, requests))
    keep = scheduler.choose(draft, survival, Load(len(requests), len(requests)))
    assert not bool((keep & ~draft.real).any())
    logits = torch.tensor([row for b, r in enumerate(requests) for row in _target_rows(draft, keep, b, r, target)])
    verdict = rule.verify(draft, keep, logits, requests)
    assert not bool((verdict.accepted & ~keep).any())
    accepted = [draft.tokens[b][verdict.accepted[b]].tolist() for b in range(len(requests))]
    return [[*tokens, next_token] for tokens, next_token in zip(accepted, verdict.next_tokens.tolist(), strict=True)]


def _target_rows(draft: Draft, keep: Tensor, b: int, request: Request, target: Table) -> list[tuple[float, ...]]:
    paths = {-1: tuple(request.tokens)}
    for k in keep[b].nonzero()[:, 0].tolist():
        parent = k - 1 if draft.parents is None else int(draft.parents[b, k])
        paths[k] = (*paths[parent], int(draft.tokens[b, k]))
    return [target(path) for path in paths.values()]


def target_law(target: Table, num_tokens: int, params: SamplingParams | None = None, num_requests: int = 1) -> Law:
    """What the target alone would write, from the definitions."""
    params = params or SamplingParams()
    law: Law = {(): 1.0}
    for b in range(num_requests):
        outputs: dict[tuple[int, ...], float] = {(): 1.0}
        for _ in range(num_tokens):
            outputs = {
                (*output, token): probability * p
                for output, probability in outputs.items()
                for token, p in enumerate(shaped_law(target((b, *output)), params, [b], output))
                if p > 0
            }
        law = {(*head, tail): p * q for head, p in law.items() for tail, q in outputs.items()}  # type: ignore[misc]
    return law


def shaped_law(
    logits: Sequence[float], params: SamplingParams, prompt: Sequence[int], output: Sequence[int]
) -> list[float]:
    """Bias, penalties, temperature, top-k, top-p and min-p by their definitions, one token after the other."""
    scores = [logit + params.logit_bias.get(token, 0.0) for token, logit in enumerate(logits)]
    for token, score in enumerate(scores):
        if token in prompt or token in output:
            score = score / params.repetition_penalty if score > 0 else score * params.repetition_penalty
        score -= params.presence_penalty * (token in output) + params.frequency_penalty * list(output).count(token)
        scores[token] = score
    if params.temperature == 0:
        return softmax(scores, 0.0)
    temperature = ctypes.c_float(params.temperature).value  # production keeps it in single precision
    if params.top_k:
        kth = sorted(scores, reverse=True)[min(params.top_k, len(scores)) - 1]
        scores = [score if score >= kth else -math.inf for score in scores]
    law = softmax(scores, temperature)
    if params.top_p < 1:
        ordered = sorted(law, reverse=True)
        edge = ordered[min(bisect_left(list(accumulate(ordered)), params.top_p), len(law) - 1)]
        scores = [score if p >= edge else -math.inf for score, p in zip(scores, law, strict=True)]
        law = softmax(scores, temperature)
    scores = [s if p >= params.min_p * max(law) else -math.inf for s, p in zip(scores, law, strict=True)]
    return softmax(scores, temperature)
