"""How well was it chosen? Promises against what came of them, summed over steps."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from dspark.budget.capacity import Capacity
from dspark.types import StepRecord


def rates(capacity: Capacity, record: StepRecord) -> tuple[float, float]:
    """Tokens per second of what was chosen, and of who had known what the target accepts; zeros where that is unknown.

    That one verifies exactly the accepted tokens, or does not draft where plain decoding is faster. Both sides are priced
    by what the capacity believes, so that a step that happened to be slow is nobody's fault.
    """
    load, real = record.load, record.predicted_seconds
    if load is None or load.num_prompt_tokens or not record.request_ids or not real or not capacity.is_known:
        return 0.0, 0.0
    num_requests, accepted = len(record.request_ids), sum(record.accepted)
    if not record.num_asked:  # most steps where drafts do not pay: there was nothing to know better
        return num_requests / real, num_requests / real
    tokens = num_requests + accepted
    plain, exact = (capacity.seconds_of(n, load.num_requests, load.context_tokens) for n in (num_requests, tokens))
    drafting = capacity.draft_seconds(record.num_asked, load.context_tokens)
    return tokens / (real + drafting), max(tokens / (exact + drafting), num_requests / plain)


@dataclass
class Hindsight:
    """An observer of steps that decode. Nobody can have no regret: drafts are paid for before it is known what they bring.

    per_step  also remember each step, for whoever wants to look at them one by one
    """

    per_step: bool = False
    num_steps: int = 0
    verified: int = 0
    accepted: int = 0
    predicted_accepted: float = 0.0
    predicted_seconds: float = 0.0
    seconds: float = 0.0  # of the steps with a prediction, drafting left out
    scheduling_seconds: float = 0.0
    all_seconds: float = 0.0
    skipped: Counter[str] = field(default_factory=Counter)
    num_faults: int = 0
    chosen: float = 0.0  # believed seconds of what was chosen
    best: float = 0.0  # and of as many tokens in hindsight
    steps: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, record: StepRecord) -> None:
        if not record.request_ids:
            return
        self.num_steps += 1
        self.verified += sum(record.verified)
        self.accepted += sum(record.accepted)
        self.predicted_accepted += record.predicted_accepted
        if record.predicted_seconds > 0:
            self.predicted_seconds += record.predicted_seconds
            self.seconds += record.step_seconds
        self.scheduling_seconds += record.seconds.get("schedule", 0.0)
        self.all_seconds += sum(record.seconds.values())
        if record.skip_reason is not None:
            self.skipped[record.skip_reason] += record.num_skipped
        self.num_faults += record.num_faults
        if record.rate:
            tokens = len(record.request_ids) + sum(record.accepted)
            self.chosen += tokens / record.rate
            self.best += tokens / record.best_rate
        if self.per_step:
            self.steps.append(_as_json(record))

    @property
    def regret(self) -> float:
        """Share of the time that perfect knowledge would have saved."""
        return 1 - self.best / self.chosen if self.chosen else 0.0

    def as_json(self) -> dict[str, Any]:
        """All counts, and with `per_step` a row for each step."""
        return {
            "num_steps": self.num_steps,
            "verified": self.verified,
            "accepted": self.accepted,
            "wasted": self.verified - self.accepted,
            "predicted_accepted": round(self.predicted_accepted, 2),
            "seconds": self.seconds,
            "predicted_seconds": self.predicted_seconds,
            "scheduling_share": self.scheduling_seconds / self.all_seconds if self.all_seconds else 0.0,
            "skipped_drafts": dict(self.skipped),
            "faults": self.num_faults,
            "regret": round(self.regret, 4),
        } | ({"steps": self.steps} if self.per_step else {})

    def line(self) -> str:
        """For people, after the text."""
        if not self.verified and not self.skipped:
            return "no draft token was verified"
        parts = [f"{self.verified / max(1, self.num_steps):.1f} draft tokens verified per step"]
        parts.append(f"{self.accepted} accepted ({self.predicted_accepted:.0f} expected)")
        if self.seconds:
            excess = self.seconds / self.predicted_seconds - 1
            parts.append(f"steps {abs(excess):.0%} {'slower' if excess > 0 else 'faster'} than predicted")
        if self.skipped:
            parts.append("drafts skipped: " + ", ".join(f"{n} ({why})" for why, n in self.skipped.most_common()))
        if self.num_faults:
            parts.append(f"{self.num_faults} lost to drafter faults")
        parts.append(f"regret {self.regret:.0%} (time that perfect foresight would save)")
        return ", ".join(parts)


def _as_json(record: StepRecord) -> dict[str, Any]:
    return {
        "budget": sum(record.verified),
        "accepted": sum(record.accepted),
        "predicted_accepted": round(record.predicted_accepted, 3),
        "wasted": sum(record.verified) - sum(record.accepted),
        "skipped": record.num_skipped,
        "seconds": record.step_seconds,
        "predicted_seconds": record.predicted_seconds,
        "draft_seconds": record.draft_seconds,
        "predicted_draft_seconds": record.predicted_draft_seconds,
        "tokens_per_second": round(record.rate, 2),
        "tokens_per_second_in_hindsight": round(record.best_rate, 2),
    }
