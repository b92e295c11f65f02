"""Serving without a model: drafts whose true acceptance is known, a scheduler that trims them, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from dspark.types import Draft, Request, SamplingParams, StepRecord


class Learns(Protocol):
    def survival(self, draft: Draft, requests: Sequence[Request]) -> Tensor: ...

    def observe(self, record: StepRecord) -> None: ...


def request(number: int, traffic_class: str | None = None) -> Request:
    return Request(number, [1, 2], SamplingParams(traffic_class=traffic_class), num_prompt_tokens=1)


@dataclass
class World:
    """Confidence k has logit z; P(accepted | ancestors accepted) = sigmoid(slope z + offset[k])."""

    num_requests: int = 16
    num_positions: int = 7
    slope: float = 1.0
    offsets: tuple[float, ...] = (0.0,) * 7
    states_confidence: bool = True
    spread: float = 0.0  # of each token's own chance around that, as far as it can be; outcomes follow the token's own
    knows_chances: bool = False  # as the rejection rule does
    seed: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def draft(self) -> tuple[Draft, Tensor]:
        """A draft and the true P(accepted | ancestors accepted) of each token."""
        shape = (self.num_requests, self.num_positions)
        logits = torch.randn(shape, generator=self.generator) * 1.2 + 0.6
        truth = torch.sigmoid(self.slope * logits + torch.tensor(self.offsets))
        confidence = torch.sigmoid(logits) if self.states_confidence else None
        tokens, sizes = torch.zeros(shape).long(), torch.full((self.num_requests,), self.num_positions)
        return Draft(tokens, sizes, confidence), truth

    def serve(
        self, beliefs: Learns, num_steps: int, threshold: float = 0.0, classes: Sequence[str | None] = (None,)
    ) -> list[float]:
        """Run steps that keep tokens with believed survival of `threshold` or more; the calibration error of each step.

        It is that of survival over the whole draft, against the truth and not against outcomes: no noise, no trimming.
        """
        errors = []
        for step in range(num_steps):
            first = 10**6 * self.seed + self.num_requests * (step // 20)  # every 20 steps new requests come
            requests = [request(first + b, classes[b % len(classes)]) for b in range(self.num_requests)]
            draft, truth = self.draft()
            survival = beliefs.survival(draft, requests)
            gap = survival.double().mean(0) - truth.double().cumprod(1).mean(0)
            errors.append(float(gap.abs().mean()))
            chosen = survival >= threshold
            kept = chosen.clone()
            if hasattr(beliefs, "wants_whole"):
                kept[beliefs.wants_whole(self.num_requests)] = True
            room = self.spread * torch.minimum(truth, 1 - truth)
            chances = truth + room * (2 * torch.rand(truth.shape, generator=self.generator) - 1)
            outcome = torch.rand(truth.shape, generator=self.generator) < chances
            accepted = (outcome & kept).long().cumprod(1).bool()
            record = StepRecord(request_ids=[r.id for r in requests], confidence=draft.confidence, survival=survival)
            record.kept, record.chosen, record.accepted_nodes = kept, chosen, accepted
            if self.knows_chances:
                is_reached = kept & torch.cat([torch.ones_like(accepted[:, :1]), accepted[:, :-1]], 1)
                record.chances = torch.where(is_reached, chances, torch.nan).double()
            beliefs.observe(record)
        return errors

    def calibration_error(self, beliefs: Learns, num_drafts: int = 4000) -> float:
        """Mean over positions of the binned error of survival, on drafts that nobody learns from."""
        world = World(**{**{f: getattr(self, f) for f in self.__dataclass_fields__ if f != "generator"}, "seed": 99})
        world.num_requests = num_drafts
        draft, truth = world.draft()
        believed = beliefs.survival(draft, [request(-1 - b) for b in range(num_drafts)]).double()
        truth = truth.double().cumprod(1)
        bins = (believed * 20).long().clamp(max=19)
        total = 0.0
        for k in range(self.num_positions):
            gaps = torch.zeros(20).double().scatter_add_(0, bins[:, k], believed[:, k] - truth[:, k])
            total += float(gaps.abs().sum()) / num_drafts
        return total / self.num_positions
