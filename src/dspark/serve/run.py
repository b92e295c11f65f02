"""One API request at work: its engine requests, and their deltas as they come from the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar

from starlette.types import Receive

from dspark.serve.backend import Backend
from dspark.serve.faults import ApiError
from dspark.types import Delta, Request

T = TypeVar("T")
Take = Callable[[int, Delta], Any]


class Run:
    """Submits on construction; `hand_out` then waits until every request has ended.

    Made and used on the event loop. `close` cancels what has not ended; it must be called whatever happens.
    """

    def __init__(self, backend: Backend, requests: Sequence[Request], max_seconds: float) -> None:
        self.requests, self._backend = list(requests), backend
        self.began, self._max_seconds = time.monotonic(), max_seconds
        self.first_delta: float | None = None
        self._take: Take | None = None
        self._early: list[tuple[int, Delta]] = []  # came before anybody took them
        self._open = len(self.requests)
        loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = loop.create_future()
        backend.submit(self.requests, [partial(self._hear, index) for index in range(self._open)])
        self._timer = loop.call_later(max_seconds, self._time_is_up)

    async def hand_out(self, take: Take) -> None:
        """Have `take(index, delta)` called at once for whatever comes: a step's events are all out after one wake-up.

        Raises ApiError where the engine failed, the server ends, or time is up, and what `take` raises. It is not called
        again then, nor once this is cancelled.
        """
        self._take = take
        for index, delta in self._early:
            self._hear(index, delta)
        await self._ended

    def _hear(self, index: int, delta: Delta) -> None:
        if self._take is None:
            self._early.append((index, delta))
            return
        if self._ended.done():
            return
        if self.first_delta is None:
            self.first_delta = time.monotonic()
        try:
            if delta.finish_reason is not None:
                _raise_if_lost(delta.finish_reason)
            self._take(index, delta)
        except Exception as error:  # noqa: BLE001  # of this request alone: `hand_out` raises it, and others go on
            self._ended.set_exception(error)
            return
        if delta.finish_reason is not None:
            self._open -= 1
            if not self._open:
                self._ended.set_result(None)

    def _time_is_up(self) -> None:
        if not self._ended.done():
            message = f"the request took longer than {self._max_seconds:g} seconds and was cancelled"
            self._ended.set_exception(ApiError(503, message, code="request_timeout"))

    def close(self) -> None:
        self._timer.cancel()
        if self._open:
            for request in self.requests:
                self._backend.cancel(request)


def _raise_if_lost(finish_reason: str) -> None:
    if finish_reason == "error":
        raise ApiError(500, "the engine failed on this request; the server's log says why", code="engine_error")
    if finish_reason == "cancelled":
        raise ApiError(503, "the server is shutting down and cancelled this request", code="shutting_down")


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
