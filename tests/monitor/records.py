"""Records as an engine would hand them out, for tests of what observes them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dspark.types import Round, SamplingParams, StepRecord


@dataclass(frozen=True)
class Finished:
    request_id: int = 0
    params: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    drafter: str = "dspark"
    prompt_token_ids: list[int] = field(default_factory=lambda: [1, 2, 3])
    token_ids: list[int] = field(default_factory=lambda: [4, 5, 6])
    finish_reason: str = "stop"
    rounds: list[Round] = field(default_factory=list)
    arrival_seconds: float = 100.0
    start_seconds: float | None = 100.5
    token_seconds: list[float] = field(default_factory=lambda: [101.0, 101.5, 101.5])


def step(
    drafted=(7,),
    verified=(5,),
    accepted=(3,),
    seconds=0.1,
    confidence=None,
    num_prompt_tokens=0,
    num_free_slots=75,
) -> StepRecord:
    return StepRecord(
        request_ids=list(range(len(drafted))),
        drafted=list(drafted),
        verified=list(verified),
        accepted=list(accepted),
        confidence=None if confidence is None else torch.tensor(confidence),
        num_prompt_tokens=num_prompt_tokens,
        num_running=len(drafted),
        num_waiting=2,
        num_free_slots=num_free_slots,
        seconds={"draft": seconds / 4, "target": seconds / 2, "verify": seconds / 4},
    )
