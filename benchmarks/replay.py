"""Serving without models: recorded drafts, a scheduler, beliefs, and a price for every step."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from benchmarks.recorded import Text
from dspark.budget.calibration import Calibration
from dspark.budget.prefix_scheduler import falling_survival, survival_of
from dspark.types import Draft, Load, PrefixScheduler, Request, SamplingParams, StepRecord


class Knee:
    """A large GPU: steps cost the same up to `knee` tokens, because weights are read anyway; then by the token."""

    def __init__(self, base: float = 8e-3, knee: int = 256, draft_share: float = 0.12) -> None:
        self.base, self.knee, self.draft_share = base, knee, draft_share

    def seconds(self, tokens: Any, requests: int, context_tokens: int, is_reading: bool = False) -> Any:
        return self.base * np.maximum(1.0, np.asarray(tokens) / self.knee)

    def draft_seconds(self, requests: int, context_tokens: int) -> float:
        return self.draft_share * self.base * max(1.0, 8 * requests / self.knee)


class Calibrated:
    """Confidences through a calibration that stays as it is; None: as they are."""

    def __init__(self, calibration: Calibration | None) -> None:
        self.calibration = calibration

    def survival(self, draft: Draft, requests: Sequence[Request]) -> Tensor:
        assert draft.confidence is not None
        return survival_of(draft, self.calibration.apply(draft.confidence) if self.calibration else draft.confidence)


class Knowing:
    """What no beliefs can reach: it knows what will be accepted."""

    num_accepted: Tensor  # [B], set before each step

    def survival(self, draft: Draft, requests: Sequence[Request]) -> Tensor:
        return (draft.depth <= self.num_accepted[:, None]).float()


class Costs(Protocol):
    def seconds(self, tokens: Any, requests: int, context_tokens: int, is_reading: bool = False) -> Any: ...

    def draft_seconds(self, requests: int, context_tokens: int) -> float: ...


@dataclass
class Slot:
    """One request at work. `stopped` texts end by themselves, which nobody knows beforehand."""

    text: Text
    request: Request
    anchor: int = 0

    @property
    def left(self) -> int:
        return len(self.text.accepted) - self.anchor


@dataclass
class Steps:
    """What came of each step; believed and happened [B, K] are of every draft token, verified or not."""

    tokens: list[int] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    verified: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    predicted: list[float] = field(default_factory=list)  # as `seconds`, without drafting
    confidence: list[Tensor] = field(default_factory=list)
    believed: list[Tensor] = field(default_factory=list)
    happened: list[Tensor] = field(default_factory=list)
    known: list[Tensor] = field(default_factory=list)
    domains: list[list[str]] = field(default_factory=list)

    def rate(self, first: int = 0, end: int | None = None) -> float:
        """Tokens per second."""
        return sum(self.tokens[first:end]) / sum(self.seconds[first:end])

    def tau(self, first: int = 0, end: int | None = None) -> float:
        return sum(self.tokens[first:end]) / sum(self.rounds[first:end])

    def verified_length(self, first: int = 0, end: int | None = None) -> float:
        return sum(self.verified[first:end]) / sum(self.rounds[first:end])


class Replay:
    """A closed loop of `num_requests`: whoever ends makes room for the next text.

    costs    what the scheduler believes of seconds; it learns if it can (`observe`)
    seconds  what a step really takes, given what the costs believed at first; None: just that
    """

    def __init__(
        self,
        beliefs: Any,
        scheduler: PrefixScheduler,
        costs: Costs,
        num_requests: int,
        seed: int = 0,
        seconds: Callable[[int, Load], float] | None = None,
    ) -> None:
        self.beliefs, self.scheduler, self.costs, self.num_requests = beliefs, scheduler, costs, num_requests
        self.random, self.seconds, self.steps = random.Random(seed), seconds, Steps()
        self.slots: list[Slot] = []
        self._next_id = 0

    def serve(self, texts: Sequence[Text], num_steps: int, is_new: bool = True) -> Steps:
        """Run steps on these texts. is_new: whoever is at work makes room at once, as after a sudden switch."""
        if is_new:
            self.slots = [self.slot(texts, anywhere=True) for _ in range(self.num_requests)]
        for _ in range(num_steps):
            self.step()
            self.slots = [slot if slot.left else self.slot(texts) for slot in self.slots]
        return self.steps

    def slot(self, texts: Sequence[Text], anywhere: bool = False) -> Slot:
        text = self.random.choice(texts)
        anchor = self.random.randrange(len(text.accepted)) if anywhere else 0
        self._next_id += 1
        prompt = text.prompt + anchor + 1
        return Slot(text, Request(self._next_id, [0] * prompt, SamplingParams(), num_prompt_tokens=prompt), anchor)

    def step(self) -> None:
        slots, requests = self.slots, [s.request for s in self.slots]
        confidence = torch.tensor([s.text.confidence[s.anchor] for s in slots])
        limits = torch.tensor([s.text.accepted[s.anchor] for s in slots])
        num, length = confidence.shape
        draft = Draft(torch.zeros(num, length, dtype=torch.long), torch.full((num,), length), confidence)
        left = torch.tensor([s.left for s in slots])
        # A text that ends by the limit of tokens needs no draft token for its last one.
        room = torch.where(torch.tensor([s.text.has_ended for s in slots]), length, left - 1)
        if isinstance(self.beliefs, Knowing):
            self.beliefs.num_accepted = limits
        survival = falling_survival(draft, self.beliefs.survival(draft, requests))
        context = sum(len(r.tokens) for r in requests)
        load = Load(num, num, context, self.costs.draft_seconds(num, context))
        chosen = self.scheduler.choose(draft, survival, load) & (draft.depth <= room[:, None])
        kept = chosen.clone()
        if hasattr(self.beliefs, "wants_whole"):
            whole = self.beliefs.wants_whole(num)
            kept[whole] = (draft.depth <= room[:, None])[whole]
        accepted = kept & (draft.depth <= limits[:, None])
        num_read = num + int(kept.sum())
        predicted = float(self.costs.seconds(np.array([num_read]), num, context)[0])
        taken = predicted if self.seconds is None else self.seconds(num_read, load)
        num_committed = self._commit(accepted.sum(1).tolist())
        record = StepRecord(
            request_ids=[r.id for r in requests],
            drafted=draft.sizes.tolist(),
            verified=kept.sum(1).tolist(),
            accepted=accepted.sum(1).tolist(),
            confidence=confidence,
            survival=survival,
            kept=kept,
            chosen=chosen,
            accepted_nodes=accepted,
            load=load,
            num_asked=num,
            num_tokens=num_read,
            seconds={"target": taken, "draft": load.draft_seconds},
        )
        for learner in (self.beliefs, self.scheduler, self.costs):
            if hasattr(learner, "observe"):
                learner.observe(record)
        steps = self.steps
        steps.tokens.append(num_committed)
        steps.rounds.append(num)
        steps.verified.append(int(kept.sum()))
        steps.accepted.append(int(accepted.sum()))
        steps.seconds.append(taken + load.draft_seconds)
        steps.predicted.append(predicted)
        steps.confidence.append(confidence)
        steps.believed.append(survival)
        steps.happened.append(draft.depth <= limits[:, None])
        steps.known.append(draft.depth <= torch.where(room < length, room, left)[:, None])
        steps.domains.append([s.text.domain for s in slots])

    def _commit(self, accepted: Sequence[int]) -> int:
        total = 0
        for slot, num in zip(self.slots, accepted, strict=True):
            committed = min(num + 1, slot.left)  # whatever comes after the end of a text is dropped
            total += committed
            slot.anchor += committed
            slot.request.tokens += [0] * committed
            if not slot.left:
                slot.request.finish_reason = "stop" if slot.text.has_ended else "length"
        return total
