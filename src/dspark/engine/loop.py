"""The loop: admit, propose, choose, extend, verify, commit. Generation, serving and benchmarks all run this one step."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dspark.budget.hindsight import rates
from dspark.engine.batcher import is_reading
from dspark.engine.ledger import verify_spans
from dspark.types import Draft, Load, Request, Span, StepRecord, Verdict

if TYPE_CHECKING:
    from dspark.engine.engine import Engine


def plain_step(engine: Engine) -> StepRecord:
    """Move every running request on by one target pass."""
    record = StepRecord()
    lap = Laps(record.seconds)
    _make_room(engine, record)
    decoding = [r for r in engine.batcher.running if not is_reading(r)]
    prompts = engine.batcher.prompt_spans(math.ceil(len(decoding) * engine.tokens_per_request))
    record.load = load_of(record, decoding, prompts)
    lap("admit")
    # A request with room for one more token needs no draft: the target's own next token ends it.
    room = [engine.ledger.room(r) - 1 for r in decoding]
    draft = engine.drafting.propose(record, decoding, [b for b, tokens in enumerate(room) if tokens > 0])
    lap("draft")
    keep = engine.choosing.choose(record, draft, decoding, room)
    spans = verify_spans(decoding, draft, keep) + [span for _, span in prompts]
    lap("schedule")
    if spans:
        out = engine.target.extend(spans, engine.feature_layers)
        lap("target")
        judged = decoding + [r for r, span in prompts if span.num_logits]
        if len(judged) > len(decoding):
            draft = draft.among(range(len(decoding)), len(judged))
            keep = torch.cat([keep, keep.new_zeros(len(judged) - len(decoding), keep.shape[1])])
        verdict = engine.rule.verify(draft, keep, out.logits, judged)
        lap("verify")
        note_verdict(record, decoding, draft, keep, verdict)
        engine.ledger.commit(decoding + [r for r, _ in prompts], spans, draft, keep, verdict, out)
        lap("commit")
    if decoding:
        engine.tokens_per_request = (record.num_tokens - record.num_prompt_tokens) / len(decoding)
    tell(engine, record)
    return record


def _make_room(engine: Engine, record: StepRecord) -> None:
    """Settle who runs in this step."""
    if engine.prefixes is not None:
        for request in engine.batcher.running:
            engine.prefixes.take_in(request)
    _admit(engine, record)
    while (preempted := engine.batcher.preempt(engine.target.num_free_slots)) is not None:
        engine.ledger.forget(preempted)
        record.num_preempted += 1
    if engine.batcher.waiting and not engine.batcher.running and engine.neighbours.make_way(engine):
        _admit(engine, record)


def _admit(engine: Engine, record: StepRecord) -> None:
    for request in engine.batcher.admit(engine.target.num_free_slots):
        engine.ledger.begin(record, request)


def load_of(record: StepRecord, decoding: list[Request], prompts: list[tuple[Request, Span]]) -> Load:
    """What the target reads whatever is drafted; record says how much of it there is."""
    record.num_prompt_tokens = sum(len(span.tokens) for _, span in prompts)
    record.num_context_tokens = sum(r.num_cached for r in decoding) + sum(span.start for _, span in prompts)
    return Load(
        base_tokens=len(decoding) + record.num_prompt_tokens,
        num_requests=len(decoding) + len(prompts),
        context_tokens=record.num_context_tokens,
        num_prompt_tokens=record.num_prompt_tokens,
    )


def note_verdict(record: StepRecord, decoding: list[Request], draft: Draft, keep: Tensor, verdict: Verdict) -> None:
    """What became of the draft, for those who learn."""
    n = len(decoding)
    record.request_ids = [r.id for r in decoding]
    record.drafted = draft.sizes.tolist()[:n]
    record.verified = [sum(row) for row in keep.tolist()[:n]]
    record.accepted = [sum(row) for row in verdict.accepted.tolist()[:n]]
    of_all = keep, verdict.accepted, draft.confidence, draft.parents, verdict.chances
    own = of_all if len(keep) == n else tuple(None if x is None else x[:n] for x in of_all)
    record.kept, record.accepted_nodes, record.confidence, record.parents, record.chances = own


def tell(engine: Engine, record: StepRecord) -> None:
    """Let learners and observers know of a step that is over."""
    record.num_running, record.num_waiting = len(engine.batcher.running), len(engine.batcher.waiting)
    record.num_free_slots = engine.target.num_free_slots
    if engine.observers:  # nobody else wants to know
        record.rate, record.best_rate = rates(engine.capacity, record)
    begin = time.perf_counter()
    for learner in engine.learners:  # beliefs first: what they take is part of what the others are told of the step
        learner.observe(record)
        record.seconds["learn"] = time.perf_counter() - begin
    for observe in engine.observers:
        observe(record)


class Laps:
    """Writes down how long each phase took, as it ends."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds, self._began = seconds, time.perf_counter()

    def __call__(self, phase: str) -> None:
        now = time.perf_counter()
        self._seconds[phase], self._began = now - self._began, now
