"""The engine as the server sees it: beside it in this process, or (`engine_process`) in one of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from dspark.engine.intake import Intake
from dspark.engine.worker import Sink, Worker
from dspark.types import Delta, Request, SamplingParams


class Backend(Protocol):
    """What routes ask for. All of it on the event loop, but for `prepare`, which any thread may call.

    is_alive      False: it has ended, whoever wanted that
    is_draining   takes no new requests and finishes those it has
    num_open      requests that were taken and have not ended
    """

    @property
    def intake(self) -> Intake: ...
    @property
    def is_alive(self) -> bool: ...
    @property
    def is_draining(self) -> bool: ...
    @property
    def num_open(self) -> int: ...

    async def open(self) -> None:
        """Before anything else, on the loop that will use it."""
        ...

    def prepare(self, prompt: Sequence[int], params: SamplingParams, raw: bool = False) -> Request: ...

    def submit(self, requests: Sequence[Request], sinks: Sequence[Sink]) -> None:
        """Take prepared requests, all or none; deltas come to their sinks on the event loop. Raises QueueFull and others.

        What is known of a request once its last delta has come (rounds, tokens) is in the request itself.
        """
        ...

    def cancel(self, request: Request) -> None: ...
    def cancel_all(self) -> None: ...
    def begin_drain(self) -> None: ...

    async def is_stuck(self) -> bool:
        """Whether a step has been running for far too long."""
        ...

    async def metrics(self) -> bytes:
        """The page that Prometheus scrapes."""
        ...

    async def snapshot(self) -> dict[str, Any]:
        """The numbers that the dashboard shows."""
        ...


@dataclass(frozen=True)
class Watched:
    """A started worker, and what can be seen of it: the page that is scraped, and the dashboard's numbers."""

    worker: Worker
    metrics: Callable[[], bytes] = bytes
    snapshot: Callable[[], dict[str, Any]] = dict


class InProcess:
    """A worker's thread beside the event loop; whoever started the worker stops it. See `Backend`.

    All that a step brought goes to the loop at once: every wake-up makes the engine wait for its next turn at the
    interpreter.
    """

    def __init__(self, watched: Watched) -> None:
        self.worker, self._watched = watched.worker, watched
        self._held: list[tuple[Sink, Delta]] = []  # of the worker's thread
        self.cancel, self.cancel_all = self.worker.cancel, self.worker.cancel_all
        self.begin_drain, self.prepare = self.worker.begin_drain, self.worker.engine.prepare

    @property
    def intake(self) -> Intake:
        return self.worker.engine.intake

    @property
    def is_alive(self) -> bool:
        return self.worker.is_alive

    @property
    def is_draining(self) -> bool:
        return self.worker.is_draining

    @property
    def num_open(self) -> int:
        return self.worker.num_open

    async def open(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.worker.on_delivered.append(self._send)

    def submit(self, requests: Sequence[Request], sinks: Sequence[Sink]) -> None:
        self.worker.submit(requests, [partial(self._hold, sink) for sink in sinks])

    async def is_stuck(self) -> bool:
        return self.worker.is_stuck

    async def metrics(self) -> bytes:
        return await asyncio.to_thread(self._watched.metrics)

    async def snapshot(self) -> dict[str, Any]:
        return await asyncio.to_thread(self._watched.snapshot)

    def _hold(self, sink: Sink, delta: Delta) -> None:
        self._held.append((sink, delta))

    def _send(self) -> None:
        held, self._held = self._held, []
        self._loop.call_soon_threadsafe(_distribute, held)


def _distribute(held: list[tuple[Sink, Delta]]) -> None:
    for sink, delta in held:
        sink(delta)
