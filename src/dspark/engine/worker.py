"""One thread that steps an engine for callers on other threads, and outlives whatever a step does."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from dspark.engine.admission import Admission
from dspark.errors import ShuttingDown
from dspark.types import Delta, Observer, Request, RequestObserver, RequestRecord, StepRecord

if TYPE_CHECKING:
    from dspark.engine.engine import Engine

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_TELLING = 0.1

Sink = Callable[[Delta], Any]
IdleTask = Callable[[], bool]


@dataclass(eq=False)
class _Job:
    """A request, where its deltas go, and when what happened (monotonic seconds)."""

    request: Request
    sink: Sink
    arrival: float
    start: float | None = None
    finish: float | None = None
    token_seconds: list[float] = field(default_factory=list)


class Worker:
    """Steps `engine` on a thread of its own. All public methods may be called from any thread and never wait for a step.

    max_waiting       requests that may wait beyond those that run; `submit` refuses more
    stuck_seconds     a step that takes longer is reported, and `is_stuck` until it ends
    observers         called with every StepRecord, several at once where steps are short: watching costs half of what it
                      does step by step, when its code has left the processor's caches each time
    on_finished       called with a RequestRecord for every request that has ended, whatever ended it; as late as observers
    on_delivered      called once after the sinks of all that a step brought: the time to wake whoever waits for it
    idle_tasks        called while there is nothing to do, in turn; each does a little (at most about one step) and returns
                      whether it has more. Requests go first: the next one is looked for after every call.
    at_end            called once, after the last request: what idle tasks hold is given back here
    drafter           how records name the engine's drafter

    All of these run on the worker's thread. One that raises is logged and not called again: watching must never cost a
    request.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_waiting: int = 256,
        stuck_seconds: float = 120.0,
        observers: Iterable[Observer] = (),
        on_finished: Iterable[RequestObserver] = (),
        on_delivered: Iterable[Callable[[], Any]] = (),
        idle_tasks: Iterable[IdleTask] = (),
        at_end: Iterable[Callable[[], Any]] = (),
        drafter: str | None = None,
    ) -> None:
        self.engine, self.stuck_seconds = engine, stuck_seconds
        self.admission = Admission(engine.batcher.max_running, max_waiting)  # under the lock
        self.drafter = drafter or type(engine.drafter).__name__
        self.observers: list[Observer] = list(observers)
        engine.choosing.foretells = True  # they read records after the step
        self.on_finished: list[RequestObserver] = list(on_finished)
        self.on_delivered: list[Callable[[], Any]] = list(on_delivered)
        self.idle_tasks: list[IdleTask] = list(idle_tasks)
        self.at_end: list[Callable[[], Any]] = list(at_end)
        self.num_faults = 0  # steps that raised
        self._inbox: SimpleQueue[Callable[[], Any]] = SimpleQueue()
        self._jobs: dict[int, _Job] = {}  # of the worker's thread alone
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._step_began: float | None = None
        self._untold: list[StepRecord] = []
        self._untold_jobs: list[_Job] = []  # that have ended
        self._last_told = 0.0
        self._thread = threading.Thread(target=self._run, name="dspark-engine", daemon=True)
        self._watchdog = threading.Thread(target=self._watch, name="dspark-watchdog", daemon=True)

    # -- what callers use ------------------------------------------------------------------------------------------------

    def start(self) -> Worker:
        """Begin to step; returns itself."""
        self._thread.start()
        self._watchdog.start()
        return self

    def submit(self, requests: Sequence[Request], sinks: Sequence[Sink]) -> None:
        """Take prepared requests, all or none. Every sink gets its request's deltas, the last with a finish_reason.

        Sinks are called on the worker's thread and must return at once. Raises QueueFull and ShuttingDown.
        """
        arrival = time.monotonic()
        with self._lock:
            if not self._thread.is_alive():
                raise ShuttingDown("the engine's thread has ended: no new request is taken")
            self.admission.take(len(requests))
            jobs = [_Job(request, sink, arrival) for request, sink in zip(requests, sinks, strict=True)]
            self._inbox.put(partial(self._accept, jobs))

    def cancel(self, request: Request) -> None:
        """End a request with reason `cancelled` before the next step; one that has ended stays as it is."""
        self._inbox.put(partial(self.engine.cancel, request))

    def cancel_all(self) -> None:
        """End every request with reason `cancelled` before the next step."""
        self._inbox.put(self._cancel_jobs)

    def wake(self) -> None:
        """Ask the idle tasks again."""
        self._inbox.put(_nothing)

    def begin_drain(self) -> None:
        """Take no new requests; the thread ends once those it has are finished."""
        with self._lock:
            self.admission.close()
        self.wake()

    def drain(self, timeout: float | None = None) -> bool:
        """Finish what was taken and stop. Whether all of it was finished; after `timeout` seconds the rest is cancelled."""
        self.begin_drain()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        is_done = not self._thread.is_alive()
        self.close()
        return is_done

    def wait(self) -> None:
        """Until the thread has ended."""
        self._thread.join()

    def close(self, timeout: float | None = 30.0) -> None:
        """Cancel everything and stop; waits for the current step."""
        self.begin_drain()
        self.cancel_all()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        self._ended.set()
        if self._watchdog.ident is not None:
            self._watchdog.join(timeout)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused because it is about to end."""
        return self.admission.is_closed

    @property
    def is_stuck(self) -> bool:
        """Whether the current step has been running for more than `stuck_seconds`."""
        began = self._step_began
        return began is not None and time.monotonic() - began > self.stuck_seconds

    @property
    def num_open(self) -> int:
        """Requests that were taken and have not ended."""
        return self.admission.num_open

    # -- the thread ------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._obey():
            if self.engine.has_work:
                self._step()
            self._deliver()  # before anything that only watches
            is_idle = not self.engine.has_work and self._inbox.empty()
            self._tell(is_idle)
            if is_idle:
                self._rest()
        self._tell(is_idle=True)
        for call in list(self.at_end):
            self._guarded(self.at_end, call)

    def _obey(self) -> bool:
        """Do what callers asked for; False once there is nothing left to do, ever."""
        while not self._inbox.empty():
            self._inbox.get()()
        return not self.is_draining or bool(self._jobs) or not self._inbox.empty()

    def _rest(self) -> None:
        """Idle tasks while they have something to do, else wait for a caller."""
        for task in list(self.idle_tasks):
            if self._guarded(self.idle_tasks, task):
                return
        if not self.is_draining:
            self._inbox.get()()

    def _step(self) -> None:
        self._step_began = began = time.monotonic()
        try:
            record = self.engine.step()
        except Exception:  # whatever it was, the other requests must go on
            self.num_faults += 1
            failed = self.engine.fail_running()
            log.exception("a step raised: its %d requests fail, the others go on", len(failed))
            return
        finally:
            self._step_began = None
        self._note_starts(record, began)
        self._untold.append(record)

    def _note_starts(self, record: StepRecord, began: float) -> None:
        waiting = {request.id for request in self.engine.batcher.waiting} if record.num_waiting else set()
        for job in self._jobs.values():
            if job.start is None and job.request.id not in waiting:
                job.start = began

    def _accept(self, jobs: Sequence[_Job]) -> None:
        for job in jobs:
            self._jobs[job.request.id] = job
            self.engine.enqueue(job.request)

    def _cancel_jobs(self) -> None:
        for job in self._jobs.values():
            self.engine.cancel(job.request)

    def _deliver(self) -> None:
        """Hand out what every request got since the last time, and close those that have ended."""
        now, ended, is_any = time.monotonic(), list[_Job](), False
        for job in self._jobs.values():
            request, num_seen = job.request, len(job.token_seconds)
            num_new = len(request.tokens) - request.num_prompt_tokens - num_seen
            if not num_new and request.finish_reason is None:
                continue
            job.token_seconds += [now] * num_new
            is_any = True
            if request.finish_reason is not None:
                ended.append(job)
            self._hand_out(job, num_seen)
        for job in ended:
            self._close(job, now)
        if is_any:
            for call in list(self.on_delivered):
                self._guarded(self.on_delivered, call)

    def _hand_out(self, job: _Job, num_seen: int) -> None:
        try:
            delta = _delta(job.request, num_seen)
        except Exception:
            log.exception("request %d fails: its tokens could not be turned into text", job.request.id)
            self.engine.cancel(job.request)
            delta = Delta("", [], [], "error")
        try:
            job.sink(delta)
        except Exception:
            log.exception("request %d is cancelled: nobody takes its output", job.request.id)
            self.engine.cancel(job.request)  # the next round closes it

    def _close(self, job: _Job, now: float) -> None:
        job.finish = now
        del self._jobs[job.request.id]
        self._untold_jobs.append(job)
        with self._lock:
            self.admission.end(job.arrival, now)

    def _tell(self, is_idle: bool) -> None:
        """Let those who watch know of steps and of requests that have ended, if it is time."""
        now = time.monotonic()
        if not is_idle and now - self._last_told < _SECONDS_BETWEEN_TELLING:
            return
        records, self._untold = self._untold, []
        ended, self._untold_jobs, self._last_told = self._untold_jobs, [], now
        for record in records:
            for observe in list(self.observers):
                self._guarded(self.observers, observe, record)
        for job in ended if self.on_finished else ():
            finished = self._record(job)
            for observe_request in list(self.on_finished):
                self._guarded(self.on_finished, observe_request, finished)

    def _record(self, job: _Job) -> RequestRecord:
        request = job.request
        assert job.finish is not None
        return RequestRecord(
            request_id=request.id,
            params=request.params,
            seed=request.seed,
            drafter=self.drafter,
            prompt_token_ids=request.tokens[: request.num_prompt_tokens],
            token_ids=request.generated,
            finish_reason=request.finish_reason or "unfinished",
            rounds=list(request.rounds),
            arrival_seconds=job.arrival,
            start_seconds=job.start,
            finish_seconds=job.finish,
            token_seconds=job.token_seconds,
        )

    def _guarded(self, those: list[Any], call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except Exception:  # it only watches; what it watches must go on
            log.exception("%r raised and is not called again", call)
            those.remove(call)
            return None

    def _watch(self) -> None:
        interval = max(0.05, min(5.0, self.stuck_seconds / 4))
        reported: float | None = None
        while not self._ended.wait(interval):
            if self.is_stuck and self._step_began != reported:
                reported = self._step_began
                log.error("a step has been running for more than %g s: the engine is stuck", self.stuck_seconds)
            if not self._thread.is_alive():
                return


def _delta(request: Request, num_seen: int) -> Delta:
    tokens = request.tokens[request.num_prompt_tokens + num_seen :]
    text = "" if request.text is None else request.text.take(tokens, request.finish_reason is not None)
    logprobs = request.logprobs[num_seen:] if request.params.logprobs is not None else []
    fault = None if request.finish_reason is None else _fault(request)
    return Delta(text, tokens, request.is_drafted[num_seen:], request.finish_reason, logprobs, fault)


def _fault(request: Request) -> str | None:
    """Why the grammar of a request that has ended could not be followed to its end."""
    if request.matcher is None or not request.generated:
        return None
    *before, last = request.generated
    if request.finish_reason == "stop" and not request.matcher.allowed(before)[last]:
        return "it allows no token of this model after what was written"
    return getattr(request.matcher, "fault", None)


def _nothing() -> None:
    pass
