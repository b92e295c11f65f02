"""Is what users get what the target alone would have written? The only alarm for corrupted output at normal acceptance.

A share of the finished requests is generated again while the server is idle, without speculation and with the same
seed. Under the coupled rule the token ids must be the same; what differs is explained by rounding, or is a bug.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from dspark.errors import DSparkError, InvalidConfiguration
from dspark.monitor.identity import Difference, LogitsOf, judge
from dspark.types import Request, RequestRecord, SamplingParams, StepRecord

Kind = Literal["equal", "explained", "unexplained", "unjudged", "abandoned"]
_REPLAYED = ("stop", "length")  # others ended for reasons that lie outside of the text


class PlainEngine(Protocol):
    """An engine over the same target without a drafter and without a prefix cache."""

    @property
    def has_work(self) -> bool: ...
    def submit(self, prompt: Sequence[int], params: SamplingParams) -> Request: ...
    def step(self) -> StepRecord: ...
    def set_aside(self) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """What became of one canary.

    kind     equal, explained (rounding turned a near tie), unexplained (corrupted output), unjudged (either of the two:
             there is nobody to ask in float32), abandoned (could not be run)
    logprob  mean log-probability that the target gives its own tokens; None where nothing was generated
    """

    kind: Kind
    record: RequestRecord
    plain_token_ids: list[int]
    difference: Difference | None = None
    logprob: float | None = None


class Canaries:
    """Replays finished requests. Give `request` to the worker's on_finished, `step` to its observers, `idle` to its
    idle tasks, `close` to what it does at its end.

    share      of the finished requests, 0 .. 1
    dtype      of the target: what rounding may explain
    logits_of  the target in float32; without it differences in a lesser dtype are unjudged
    observers  called with every Outcome; step_observers with the record of every plain step (a measure of plain decoding)
    num_kept   differing outcomes remembered with both traces
    """

    def __init__(
        self,
        engine: PlainEngine,
        share: float,
        dtype: str,
        logits_of: LogitsOf | None = None,
        *,
        observers: Iterable[Callable[[Outcome], Any]] = (),
        step_observers: Iterable[Callable[[StepRecord], Any]] = (),
        max_waiting: int = 16,
        num_kept: int = 32,
        seed: int = 0,
    ) -> None:
        if not 0 <= share <= 1:
            raise InvalidConfiguration(f"the share of canaries must be in 0 .. 1; got {share}")
        self.engine, self.share, self.dtype, self.logits_of = engine, share, dtype, logits_of
        self.observers, self.step_observers = list(observers), list(step_observers)
        self.max_waiting = max_waiting
        self.kept: deque[Outcome] = deque(maxlen=num_kept)
        self.num_passed_over = 0  # chosen while enough others were waiting
        self._random = random.Random(seed)
        self._replays: list[tuple[RequestRecord, Request]] = []

    def request(self, record: RequestRecord) -> None:
        """Observer of finished requests: choose some."""
        if record.finish_reason not in _REPLAYED or not record.token_ids or self._random.random() >= self.share:
            return
        if len(self._replays) >= self.max_waiting:
            self.num_passed_over += 1
            return
        params = replace(record.params, seed=record.seed, logprobs=0, prompt_logprobs=None)
        try:
            self._replays.append((record, self.engine.submit(record.prompt_token_ids, params)))
        except DSparkError:  # longer than plain decoding can hold, say: no verdict, but counted
            self._tell(Outcome("abandoned", record, []))

    def step(self, record: StepRecord) -> None:
        """Observer of the server's steps: users' requests need the slots."""
        if self.engine.has_work:
            self.engine.set_aside()

    def idle(self) -> bool:
        """One plain step; whether there is more to do."""
        if not self.engine.has_work:
            return False
        record = self.engine.step()
        for observe in self.step_observers:
            observe(record)
        ended = [replay for replay in self._replays if replay[1].finish_reason is not None]
        self._replays = [replay for replay in self._replays if replay[1].finish_reason is None]
        for replay in ended:
            self._tell(self._judged(*replay))
        return self.engine.has_work

    def close(self) -> None:
        """Give the slots of unfinished replays back."""
        self.engine.set_aside()

    def _judged(self, record: RequestRecord, replay: Request) -> Outcome:
        plain = replay.generated
        difference = judge(
            record.prompt_token_ids, plain, record.token_ids, record.params, record.seed, self.dtype, self.logits_of
        )
        logprob = sum(p.logprob for p in replay.logprobs) / len(replay.logprobs) if replay.logprobs else None
        return Outcome(self._kind(difference), record, plain, difference, logprob)

    def _kind(self, difference: Difference | None) -> Kind:
        if difference is None:
            return "equal"
        if difference.is_explained:
            return "explained"
        is_ending = None in (difference.token_id, difference.plain_token_id)
        return "unjudged" if self.logits_of is None and self.dtype != "float32" and not is_ending else "unexplained"

    def _tell(self, outcome: Outcome) -> None:
        if outcome.difference is not None:
            self.kept.append(outcome)
        for observe in self.observers:
            observe(outcome)
