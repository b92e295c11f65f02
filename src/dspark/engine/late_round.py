"""A round that the host reads once: the target reads a draft where the drafter has left it, before anybody else does.

For chains of a length that does not depend on them. Draft tokens, confidences and what the target draws come over in
one copy, so that nothing is laid out or launched while the device has nothing to do but wait.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dspark.engine.ledger import verify_spans
from dspark.engine.loop import Laps, load_of, note_verdict, tell
from dspark.transfer import coming_to_host, on_device
from dspark.types import Draft, Request, Span, StepRecord, Verdict

if TYPE_CHECKING:
    from dspark.engine.engine import Engine

UNREAD = (-1,)  # a token that the host does not know; no embedding takes it for one


def late_round(engine: Engine, requests: list[Request]) -> StepRecord:
    """Draft for all of these and verify as many tokens of each as the scheduler's length and the request's room allow."""
    record = StepRecord()
    lap = Laps(record.seconds)
    if engine.prefixes is not None:
        for request in requests:
            engine.prefixes.take_in(request)
    record.load = load_of(record, requests, [])
    room = [engine.ledger.room(r) - 1 for r in requests]
    draft = engine.drafting.propose_unread(record, requests)
    drafted = draft.tokens.to(engine.target.device)
    lap("draft")
    most = min(engine.choosing.scheduler.length, draft.tokens.shape[1])  # type: ignore[attr-defined]  # who comes here has asked
    sizes = [1 + min(most, tokens) for tokens in room]
    spans = [Span(r.id, r.num_cached, UNREAD * size, num_logits=size) for r, size in zip(requests, sizes, strict=True)]
    out = engine.target.extend(spans, engine.feature_layers, _token_ids(requests, drafted, sizes))
    lap("target")
    owners = [r for r, size in zip(requests, sizes, strict=True) for _ in range(size)]
    drawn, _ = engine.rule.draft(out.logits, owners, [UNREAD * depth for size in sizes for depth in range(size)])
    known = [] if draft.confidence is None else [draft.confidence.float()]
    tokens, judged, *known = coming_to_host(drafted, drawn, *known)()
    lap("verify")
    draft = Draft(tokens, draft.sizes, known[0] if known else None)
    keep = engine.choosing.choose(record, draft, requests, room)
    lap("schedule")
    verdict = _verdict(draft, keep, judged.tolist(), sizes)
    note_verdict(record, requests, draft, keep, verdict)
    engine.ledger.commit(requests, verify_spans(requests, draft, keep), draft, keep, verdict, out)
    lap("commit")
    engine.tokens_per_request = record.num_tokens / len(requests)
    tell(engine, record)
    return record


def _token_ids(requests: list[Request], drafted: Tensor, sizes: list[int]) -> Tensor:
    """[T]  each anchor and the draft tokens that are read after it."""
    anchors = on_device([r.tokens[-1] for r in requests], drafted.device)
    everything = torch.cat([anchors[:, None], drafted], 1)
    width = everything.shape[1]
    places = [b * width + k for b, size in enumerate(sizes) for k in range(size)]
    return everything.flatten()[on_device(places, drafted.device)]


def _verdict(draft: Draft, keep: Tensor, drawn: list[int], sizes: list[int]) -> Verdict:
    """Accept from the front what the target has drawn as well; what it has drawn after that is next."""
    accepted, next_tokens = torch.zeros_like(keep), []
    for b, (tokens, size, end) in enumerate(zip(draft.tokens.tolist(), sizes, accumulate(sizes), strict=True)):
        assert int(keep[b].sum()) == size - 1, "a scheduler that says another length than it keeps"
        own = drawn[end - size : end]
        count = next((k for k in range(size - 1) if tokens[k] != own[k]), size - 1)
        accepted[b, :count] = True
        next_tokens.append(own[count])
    return Verdict(accepted, torch.tensor(next_tokens))
