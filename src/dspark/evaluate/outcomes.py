"""Verify every draft at full length while really decoding, and note what became of it: what calibration learns from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dspark.budget.calibration import Outcomes
from dspark.engine.engine import Engine
from dspark.errors import InvalidRequest
from dspark.target.target import Target
from dspark.types import Drafter, Request, SamplingParams, StepRecord


def collect(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    rule: str = "coupled",
    max_num_seqs: int = 32,
    domains: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> Outcomes:
    """Answer the prompts (token ids) with everything verified; the rounds of prompt i belong to prompt i.

    params.seed is the first prompt's seed and the next ones count up from there. domains: of each prompt. `progress` is
    told how many prompts are done.
    """
    engine = Engine(target, drafter, scheduler=f"fixed:{drafter.length}", rule=rule, max_num_seqs=max_num_seqs)
    first = params.seed or 0
    requests = [engine.submit(list(ids), replace(params, seed=first + i)) for i, ids in enumerate(prompts)]
    owners = {request.id: i for i, request in enumerate(requests)}
    ledger = _Ledger(drafter.length)
    while engine.has_work:
        lengths = {r.id: len(r.tokens) for r in engine.batcher.running}
        record = engine.step()
        ledger.note(record, lengths, {r.id: r for r in requests if r.id in lengths}, owners)
        if progress is not None:
            progress(sum(r.finish_reason is not None for r in requests))
    return ledger.outcomes(tuple(domains) or ("all",) * len(requests))


class _Ledger:
    def __init__(self, length: int) -> None:
        self.length = length
        self.confidence: list[Tensor] = []
        self.accepted: list[int] = []
        self.num_known: list[int] = []
        self.prompts: list[int] = []

    def note(
        self, record: StepRecord, lengths: dict[int, int], requests: dict[int, Request], owners: dict[int, int]
    ) -> None:
        """Rounds that were cut short by max_tokens or the context are left out: that depends on no outcome."""
        if record.request_ids and any(record.drafted) and record.confidence is None:
            raise InvalidRequest(
                "this drafter gives no confidences, so there is nothing to calibrate beforehand; the engine learns its "
                "acceptance while serving. Use a drafter with a confidence head, such as dspark"
            )
        for b, request_id in enumerate(record.request_ids):
            if record.verified[b] < self.length or record.confidence is None:
                continue
            committed = len(requests[request_id].tokens) - lengths[request_id]
            accepted = record.accepted[b]
            # Past the token that ended the text, what the target thinks of a draft means nothing.
            was_cut = committed <= accepted
            self.confidence.append(record.confidence[b, : self.length])
            self.accepted.append(accepted)
            self.num_known.append(committed if was_cut else self.length)
            self.prompts.append(owners[request_id])

    def outcomes(self, domains: tuple[str, ...]) -> Outcomes:
        if not self.prompts:
            raise InvalidRequest("no round had room for a whole draft: use longer answers (--max-tokens)")
        places = torch.arange(self.length)
        accepted = torch.tensor(self.accepted)[:, None]
        known = places < torch.tensor(self.num_known)[:, None]
        confidence, prompts = torch.stack(self.confidence).float(), torch.tensor(self.prompts)
        return Outcomes(confidence, places <= accepted, places < accepted, known, prompts, domains)
