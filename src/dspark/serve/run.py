"""One API request at work: its engine requests, and their deltas as they come from the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.types import Receive

from dspark.serve.backend import Backend, Sink
from dspark.serve.faults import ApiError
from dspark.types import Delta, Request

T = TypeVar("T")
_Queue = asyncio.Queue[tuple[int, Delta | None]]  # None: time is up


class Run:
    """Submits on construction; iterate to get (index, delta) until every request has ended.

    Made and used on the event loop. `close` cancels what has not ended; it must be called whatever happens.
    """

    def __init__(self, backend: Backend, requests: Sequence[Request], max_seconds: float) -> None:
        self.requests, self._backend = list(requests), backend
        self.began, self._max_seconds = time.monotonic(), max_seconds
        self.first_delta: float | None = None
        self._queue: _Queue = asyncio.Queue()
        self._open = len(self.requests)
        backend.submit(self.requests, [self._sink(index) for index in range(self._open)])
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

    def _sink(self, index: int) -> Sink:
        return lambda delta: self._queue.put_nowait((index, delta))

    def close(self) -> None:
        self._timer.cancel()
        if self._open:
            for request in self.requests:
                self._backend.cancel(request)


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
