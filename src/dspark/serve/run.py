"""One API request at work: its engine requests, and their deltas as they come from the worker's thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.types import Receive

from dspark.engine.worker import Worker
from dspark.serve.faults import ApiError
from dspark.types import Delta, Request

T = TypeVar("T")
_Queue = asyncio.Queue[tuple[int, Delta | None]]  # None: time is up


class Outbox:
    """Takes what the worker's thread hands out to the event loop, all that a step brought at once.

    Every wake-up of the loop makes the engine wait for its next turn at the interpreter: one for a step, not one for each
    of its requests.
    """

    def __init__(self, worker: Worker, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._held: list[tuple[_Queue, int, Delta]] = []  # of the worker's thread
        worker.on_delivered.append(self._send)

    def sink(self, queue: _Queue, index: int) -> Callable[[Delta], None]:
        """For `Worker.submit`: deltas of request `index` come out of `queue`."""
        return lambda delta: self._held.append((queue, index, delta))

    def _send(self) -> None:
        held, self._held = self._held, []
        self._loop.call_soon_threadsafe(_distribute, held)


def _distribute(held: list[tuple[_Queue, int, Delta]]) -> None:
    for queue, index, delta in held:
        queue.put_nowait((index, delta))


class Run:
    """Submits on construction; iterate to get (index, delta) until every request has ended.

    Made and used on the event loop. `close` cancels what has not ended; it must be called whatever happens.
    """

    def __init__(self, worker: Worker, outbox: Outbox, requests: Sequence[Request], max_seconds: float) -> None:
        self.requests, self._worker = list(requests), worker
        self.began, self._max_seconds = time.monotonic(), max_seconds
        self.first_delta: float | None = None
        self._queue: _Queue = asyncio.Queue()
        self._open = len(self.requests)
        worker.submit(self.requests, [outbox.sink(self._queue, index) for index in range(self._open)])
        self._timer = asyncio.get_running_loop().call_later(max_seconds, self._queue.put_nowait, (0, None))

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """Raises ApiError where the engine failed, the server ends, or time is up."""
        while self._open:
            index, delta = await self._queue.get()
            if delta is None:
                message = f"the request took longer than {self._max_seconds:g} seconds and was cancelled"
                raise ApiError(503, message, code="request_timeout")
            self.first_delta = self.first_delta or time.monotonic()
            if delta.finish_reason is not None:
                self._open -= 1
            if delta.finish_reason == "error":
                raise ApiError(500, "the engine failed on this request; the server's log says why", code="engine_error")
            if delta.finish_reason == "cancelled":
                raise ApiError(503, "the server is shutting down and cancelled this request", code="shutting_down")
            yield index, delta

    def close(self) -> None:
        self._timer.cancel()
        if self._open:
            for request in self.requests:
                self._worker.cancel(request)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """Do the work while the client is there; None if it went away first, and then the work has been cancelled."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
