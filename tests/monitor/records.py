"""Records as an engine would hand them out, for tests of what observes them."""

from __future__ import annotations

from dataclasses import replace

import torch

from dspark.types import Load, RequestRecord, SamplingParams, StepRecord

_FINISHED = RequestRecord(
    request_id=0,
    params=SamplingParams(),
    seed=0,
    drafter="dspark",
    prompt_token_ids=[1, 2, 3],
    token_ids=[4, 5, 6],
    finish_reason="stop",
    rounds=[],
    arrival_seconds=100.0,
    start_seconds=100.5,
    finish_seconds=101.5,
    token_seconds=[101.0, 101.5, 101.5],
)


def finished(**changes) -> RequestRecord:
    return replace(_FINISHED, **changes)


def step(
    drafted=(7,),
    verified=(5,),
    accepted=(3,),
    seconds=0.1,
    confidence=None,
    num_prompt_tokens=0,
    num_free_slots=75,
    **changes,
) -> StepRecord:
    """Of chains; confidence is what the engine believed of each token given those before it."""
    positions = torch.arange(max(drafted))[None]
    believed = None if confidence is None else torch.tensor(confidence).view(len(drafted), -1)
    num_tokens = len(drafted) + sum(verified) + num_prompt_tokens
    return StepRecord(
        request_ids=list(range(len(drafted))),
        drafted=list(drafted),
        verified=list(verified),
        accepted=list(accepted),
        confidence=believed,
        survival=None if believed is None else believed.cumprod(1),
        kept=positions < torch.tensor(verified)[:, None],
        accepted_nodes=positions < torch.tensor(accepted)[:, None],
        load=Load(len(drafted) + num_prompt_tokens, len(drafted)),
        num_tokens=num_tokens,
        num_prompt_tokens=num_prompt_tokens,
        num_running=len(drafted),
        num_waiting=2,
        num_free_slots=num_free_slots,
        seconds={"draft": seconds / 4, "target": seconds / 2, "verify": seconds / 4},
        **changes,
    )
