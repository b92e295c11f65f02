"""The overlapped loop: a step is launched before the host has read what the one before it drew.

Where nothing is drafted, the device needs nothing of the host in between: what a step draws is what the next one reads,
and every request moves on by one position. So the host launches step t+1 and then waits for the tokens of step t, which
come over in one small copy, and commits them while the device computes. A request that turns out to have ended, by an
end token or a stop string, has a row too many in the step under way, which nobody takes.

Requests say nothing of a step under way: they hold what was committed, and no placeholders.

Beside drafts it does not go ahead, but it leaves them on the device until they are judged (late_round.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dspark.budget.guard import Guard
from dspark.engine.batcher import is_reading
from dspark.engine.late_round import UNREAD, late_round
from dspark.engine.loop import Laps, load_of, note_verdict, plain_step, tell
from dspark.errors import InvalidConfiguration
from dspark.target.target import Extension
from dspark.transfer import coming_to_host, on_device
from dspark.types import Draft, Drafter, PrefixScheduler, Request, Rule, Span, StepRecord, Verdict

if TYPE_CHECKING:
    from dspark.engine.engine import Engine


@dataclass(frozen=True)
class _Flight:
    """A step under way: each request reads one token and draws the next.

    spans         where each reads
    drawn    [B]  tokens on the device
    arrived       gives them on the host, once they are there, as all that came
    """

    requests: list[Request]
    spans: list[Span]
    drawn: Tensor
    arrived: Callable[[], list[Tensor]]

    @property
    def rows(self) -> list[int]:
        """Of requests that are where they were taken to be. The others have ended since, or were set aside: all is freed."""
        pairs = zip(self.requests, self.spans, strict=True)
        return [b for b, (request, span) in enumerate(pairs) if request.num_cached == span.start]

    def drawn_for(self, requests: list[Request]) -> Tensor:
        """[n]  of some of its requests."""
        if len(requests) == len(self.requests):
            return self.drawn
        places = {r.id: b for b, r in enumerate(self.requests)}
        return self.drawn[on_device([places[r.id] for r in requests], self.drawn.device)]


class Overlapped:
    """Decodes one step ahead of what the host has read, and steps plainly wherever the host has something to do first."""

    def __init__(self, drafter: Drafter, rule: Rule, scheduler: PrefixScheduler, guard: Guard | None) -> None:
        is_known = getattr(drafter, "leaves_chains", False) and hasattr(scheduler, "length") and guard is None
        if drafter.length and not is_known:
            raise InvalidConfiguration(
                "overlap=True takes no drafter, or a block drafter with scheduler='fixed:N', whose chains have a length "
                f"that is known beforehand; got {type(drafter).__name__} with {type(scheduler).__name__}"
            )
        if not rule.draws_alike:
            raise InvalidConfiguration(f"overlap=True needs rule='coupled'; got {type(rule).__name__}")
        self._flight: _Flight | None = None

    def step(self, engine: Engine) -> StepRecord:
        """Launch a step, and commit the one before it; its record's seconds are those of this call."""
        record = StepRecord()
        lap = Laps(record.seconds)
        flight, self._flight = self._flight, None
        if flight is None or not flight.rows:
            if not (requests := _ready(engine, num_ahead=0)):
                return plain_step(engine)
            if engine.drafter.length:
                return late_round(engine, requests) if _have_room(engine, requests) else plain_step(engine)
            flight = _launch(engine, requests, None)
        if requests := _ready(engine, num_ahead=1):
            self._flight = _launch(engine, requests, flight)
        lap("target")
        (tokens,) = flight.arrived()
        lap("verify")
        _land(engine, record, flight, tokens)
        lap("commit")
        tell(engine, record)
        return record


def _ready(engine: Engine, num_ahead: int) -> list[Request]:
    """Who decodes in the step after `num_ahead` under way; nobody where the host has something to do before it."""
    running, num_free = engine.batcher.running, engine.target.num_free_slots
    requests = [r for r in running if engine.ledger.room(r) > num_ahead]  # the others end by their length
    if any(is_reading(r) or _asks_the_host(r) for r in running) or engine.batcher.could_admit(num_free):
        return []
    return requests if len(requests) * engine.batcher.lookahead <= num_free else []


def _have_room(engine: Engine, requests: list[Request]) -> bool:
    """Whether each may be drafted for."""
    return all(engine.ledger.room(r) > 1 for r in requests) and not engine.drafting.has_given_up(requests)


def _asks_the_host(request: Request) -> bool:
    """Whether drawing for it takes what is known on the host only, or waits for the device by itself."""
    params = request.params
    return request.looks_back or params.logprobs is not None or params.top_p < 1


def _launch(engine: Engine, requests: list[Request], before: _Flight | None) -> _Flight:
    """before: the step whose tokens this one reads; None: those that were committed."""
    if before is None:
        spans = [Span(r.id, r.num_cached, r.tokens[-1:], num_logits=1) for r in requests]
        out = engine.target.extend(spans)
    else:
        spans = [Span(r.id, r.num_cached + 1, UNREAD, num_logits=1) for r in requests]
        out = engine.target.extend(spans, token_ids=before.drawn_for(requests))
    # What is under way is a draft token that is certain to be accepted.
    drawn, _ = engine.rule.draft(out.logits, requests, [() if before is None else UNREAD] * len(requests))
    return _Flight(requests, spans, drawn, coming_to_host(drawn))


def _land(engine: Engine, record: StepRecord, flight: _Flight, tokens: Tensor) -> None:
    """Commit tokens [B] as a plain step does that drafted nothing."""
    rows = flight.rows
    requests = [flight.requests[b] for b in rows]
    record.load = load_of(record, requests, [])
    draft = Draft.empty(len(rows))
    keep = engine.choosing.choose(record, draft, requests, room=())
    verdict = Verdict(keep, tokens[rows])
    note_verdict(record, requests, draft, keep, verdict)
    nothing = Extension(torch.empty(0), None)  # nobody asks for log-probabilities or features
    engine.ledger.commit(requests, [flight.spans[b] for b in rows], draft, keep, verdict, nothing)
