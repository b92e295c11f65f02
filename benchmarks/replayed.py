"""Random models agree on nothing, so what would be accepted is replayed: target and drafter really run, dice decide.

What is committed is then no text of the target. The dice are the same for every policy: they depend on the request and
the position alone. Per position, the drafter's confidence is drawn from a Beta law around the stated rate and
the token is accepted with that very probability, so confidences are calibrated and as telling as the law is wide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dspark.types import Draft, Drafter, Request, Rule, Verdict

_NUM_DRAFTS = 4099  # different ones; a prime, so that requests do not fall into step


class Dice:
    """rates [K]: P(draft token k is accepted, given that those before it are); concentration: of the Beta law."""

    def __init__(self, rates: Sequence[float], concentration: float = 3.0, seed: int = 0) -> None:
        dice, mean = np.random.default_rng(seed), np.clip(np.asarray(rates, dtype=float), 1e-3, 1 - 1e-3)
        confidence = dice.beta(mean * concentration, (1 - mean) * concentration, (_NUM_DRAFTS, len(mean)))
        hits = dice.random(confidence.shape) < confidence
        self.confidences = torch.from_numpy(confidence).float()
        self.accepted = torch.from_numpy(np.cumprod(hits, 1).sum(1))

    def confidence(self, requests: Sequence[Request]) -> Tensor:
        return self.confidences[_places(requests)]

    def num_accepted(self, requests: Sequence[Request]) -> Tensor:
        return self.accepted[_places(requests)]


def _places(requests: Sequence[Request]) -> list[int]:
    """By the request's first token, which tells apart those of one seed, and by how far it has come."""
    return [(r.seed + 257 * r.tokens[0] + 31 * len(r.tokens)) % _NUM_DRAFTS for r in requests]


def rates_for(tau: float, length: int) -> list[float]:
    """One rate for all `length` positions with which a round commits `tau` tokens on average, the bonus included."""
    if not 1 <= tau <= length + 1:
        raise ValueError(f"drafts of {length} tokens give 1 to {length + 1} per round; got {tau}")
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if tau_of([middle] * length) < tau else (low, middle)
    return [(low + high) / 2] * length


def tau_of(rates: Sequence[float]) -> float:
    """Tokens per round when everything is verified."""
    return 1 + float(np.cumprod(rates).sum())


class ReplayedDrafter:
    """Runs a drafter, and states the dice's confidences instead of its own."""

    def __init__(self, drafter: Drafter, dice: Dice) -> None:
        self.drafter, self.dice = drafter, dice
        self.feature_layers, self.length = drafter.feature_layers, drafter.length

    def propose(self, requests: Sequence[Request], rule: Rule) -> Draft:
        draft = self.drafter.propose(requests, rule).on_host()
        return replace(draft, confidence=self.dice.confidence(requests)[:, : draft.tokens.shape[1]])

    def read(self, requests: Sequence[Request]) -> None:
        self.drafter.read(requests)  # type: ignore[attr-defined]  # block drafters have it

    def release(self, request_id: int) -> None:
        self.drafter.release(request_id)


class ReplayedRule:
    """Runs a rule, and accepts what the dice say."""

    allows_anticipation = True  # the dice do not look at what is verified

    def __init__(self, rule: Rule, dice: Dice) -> None:
        self.rule, self.dice = rule, dice

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rule, name)  # drawing is the rule's own

    def verify(self, draft: Draft, keep: Tensor, logits: Tensor, requests: Sequence[Request]) -> Verdict:
        next_tokens = self.rule.verify(draft, keep, logits, requests).next_tokens
        return Verdict(keep & (draft.depth <= self.dice.num_accepted(requests)[:, None]), next_tokens)
