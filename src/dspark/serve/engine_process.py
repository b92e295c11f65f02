"""The server's end of the line to an engine in a process of its own, where it shares no interpreter with HTTP."""

from __future__ import annotations

import asyncio
import itertools
import logging
import multiprocessing
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import prometheus_client

from dspark.engine.admission import Admission
from dspark.errors import DSparkError, EngineLost
from dspark.serve.engine_end import Part, ended, part_of, run_engine
from dspark.serve.messages import Unpacker, packed, received

if TYPE_CHECKING:  # the child should be on its way before this process reads libraries for HTTP and text
    from dspark.engine.intake import Intake
    from dspark.serve.backend import Sink, Watched
    from dspark.types import Request, SamplingParams

log = logging.getLogger(__name__)

_LOST = "the engine has ended: only a restart of the server helps"
_NOTHING_MORE = ("", None, (), None, None)
_CLOSE_SECONDS = 40.0  # what the engine's process may take to end: its worker gives the step that runs 30


class EngineProcess:
    """Starts `make(*arguments)` in a child process; a `Backend` once it is ready. Use it as a context manager.

    make        gives a `Watched`; by name, since the child imports it
    has_failed  the child has ended by itself: what it had is lost, and only a new server helps

    Both ends notice the other's death by the end of the line, so no process is left behind, whatever ends either.
    """

    intake: Intake
    _admission: Admission
    _stuck_seconds: float

    def __init__(self, make: Callable[..., Watched], *arguments: Any) -> None:
        self._line, theirs = socket.socketpair()
        self.process = multiprocessing.get_context("spawn").Process(
            target=run_engine, args=(theirs, make, arguments), name="dspark-engine"
        )
        with theirs, _signals_ignored():
            self.process.start()
        self.has_failed = self._is_closed = False
        self._transport: asyncio.WriteTransport | None = None
        self._running: dict[int, tuple[Request, Sink, float]] = {}  # by the request's id: where deltas go, when it came
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()
        self._own = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector("dspark_front", registry=self._own)

    def wait_until_ready(self) -> None:
        """Raises DSparkError where `make` did, and EngineLost where the child ended otherwise."""
        name, *arguments = next(received(self._line), ("lost",))
        if name == "ready":
            self.intake, max_running, max_waiting, self._stuck_seconds = arguments
            self._admission = Admission(max_running, max_waiting)
            return
        self.has_failed = True
        self.process.join(_CLOSE_SECONDS)
        if name == "refused":
            raise DSparkError(arguments[0])
        raise EngineLost(f"the engine's process ended before it was ready ({self._exit}); what it said is above")

    def close(self) -> None:
        """End the child, cancelling what it has; waits for it."""
        self._is_closed = True
        with suppress(OSError):  # its end may be closed already
            self._line.shutdown(socket.SHUT_RDWR)
        self._line.close()
        self.process.join(_CLOSE_SECONDS)
        if self.process.is_alive():
            log.error("the engine's process does not end, and is killed")
            self.process.kill()
            self.process.join()
        if self.process.exitcode:
            self.has_failed = True

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- Backend ---------------------------------------------------------------------------------------------------------

    @property
    def is_alive(self) -> bool:
        return not (self.has_failed or self._is_closed)

    @property
    def is_draining(self) -> bool:
        return self._admission.is_closed

    @property
    def num_open(self) -> int:
        return self._admission.num_open

    async def open(self) -> None:
        await asyncio.get_running_loop().create_unix_connection(lambda: _Line(self), sock=self._line)

    def prepare(self, prompt: Sequence[int], params: SamplingParams, raw: bool = False) -> Request:
        from dspark.engine.stream import RunningText

        request = self.intake.prepare(prompt, params, raw)
        if not params.stop:  # otherwise the engine looks for them in the text, and sends that
            request.text = RunningText(self.intake.tokenizer, (), context=request.context)
        return request

    def submit(self, requests: Sequence[Request], sinks: Sequence[Sink]) -> None:
        if not self.is_alive:
            raise EngineLost(_LOST)
        self._admission.take(len(requests))
        now = time.monotonic()
        self._running |= {r.id: (r, sink, now) for r, sink in zip(requests, sinks, strict=True)}
        self._send("submit", [_asked(request) for request in requests])

    def cancel(self, request: Request) -> None:
        if request.id in self._running:
            self._send("cancel", request.id)

    def cancel_all(self) -> None:
        self._send("cancel_all")

    def begin_drain(self) -> None:
        self._admission.close()
        self._send("drain")

    async def is_stuck(self) -> bool:
        try:
            return bool(await asyncio.wait_for(self._show("is_stuck"), self._stuck_seconds))
        except asyncio.TimeoutError:
            return True

    async def metrics(self) -> bytes:
        page: bytes = await self._show("metrics")
        return page + prometheus_client.generate_latest(self._own)

    async def snapshot(self) -> dict[str, Any]:
        snapshot: dict[str, Any] = await self._show("snapshot")
        return snapshot

    # -- the line --------------------------------------------------------------------------------------------------------

    def _send(self, *message: Any) -> None:
        if self.is_alive:
            write = self._line.sendall if self._transport is None else self._transport.write
            write(packed(message))

    async def _show(self, what: str) -> Any:
        if not self.is_alive:
            raise EngineLost(_LOST)
        number = next(self._numbers)
        future = self._asked[number] = asyncio.get_running_loop().create_future()
        self._send("show", number, what)
        try:
            return await future
        finally:
            del self._asked[number]

    def opened(self, transport: asyncio.WriteTransport) -> None:
        self._transport = transport

    def hear_step(self, parts: Sequence[Part]) -> None:
        """What a step brought."""
        from dspark.types import Delta

        for number, tokens, is_drafted, *more in parts:
            request, sink, arrival = self._running[number]
            text, reason, logprobs, fault, facts = more or _NOTHING_MORE
            if request.text is not None:
                text = _text_of(request, tokens, is_last=reason is not None)
            delta = ended("error") if text is None else Delta(text, tokens, is_drafted, reason, logprobs, fault)
            request.tokens += delta.token_ids
            request.is_drafted += delta.is_drafted
            if delta.logprobs:
                request.logprobs += delta.logprobs
            if delta.finish_reason is not None:
                request.finish_reason = delta.finish_reason
                vars(request).update(facts or {})
                del self._running[number]
                self._admission.end(arrival, time.monotonic())
            sink(delta)

    def hear_shown(self, number: int, value: Any, error: str | None) -> None:
        future = self._asked.get(number)
        if future is None or future.done():
            return  # whoever asked has gone
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(DSparkError(error))

    def lost(self) -> None:
        """The line has ended."""
        if self._is_closed:
            return
        self.has_failed = True
        self.process.join(1.0)  # it is ending, and then it can be said how
        log.error("the engine's process has ended (%s), and with it %d requests", self._exit, len(self._running))
        self.hear_step([part_of(number, ended("error")) for number in list(self._running)])
        for future in self._asked.values():
            if not future.done():
                future.set_exception(EngineLost(_LOST))

    @property
    def _exit(self) -> str:
        code = self.process.exitcode
        return "still running" if code is None else f"exit code {code}"


class _Line(asyncio.Protocol):
    """Bytes of the line into messages, on the event loop."""

    def __init__(self, engine: EngineProcess) -> None:
        self._engine, self._unpacker = engine, Unpacker()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._engine.opened(transport)  # type: ignore[arg-type]  # a stream's transport can write

    def data_received(self, data: bytes) -> None:
        for name, *arguments in self._unpacker.feed(data):
            getattr(self._engine, f"hear_{name}")(*arguments)

    def connection_lost(self, _: Exception | None) -> None:
        self._engine.lost()


def _asked(request: Request) -> Any:
    """What the other end needs to make the same request. A compiled grammar cannot travel; its text can."""
    grammar = request.params.grammar
    params = replace(request.params, seed=request.seed, grammar=None)
    return request.id, request.tokens, params, request.is_raw, None if grammar is None else grammar.text


def _text_of(request: Request, tokens: list[int], is_last: bool) -> str | None:
    """What they add to a text that is made here; None: the request fails."""
    assert request.text is not None
    try:
        return request.text.take(tokens, is_last)
    except Exception:  # of this request alone; its client hears of it, and then it is cancelled
        log.exception("request %d fails: its tokens could not be turned into text", request.id)
        return None


@contextmanager
def _signals_ignored() -> Iterator[None]:
    """A process started meanwhile begins with Ctrl-C and SIGTERM ignored: they are for the server, which ends it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say so
        return
    names = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(name, signal.SIG_IGN) for name in names]
    try:
        yield
    finally:
        for name, handler in zip(names, before, strict=True):
            signal.signal(name, handler)
