"""The body of a response, written at the moment there is something to write."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Coroutine, Generator
from typing import Any

from starlette.types import Send


class Body:
    """Pieces of a body, sent from whatever code has them: no task has to be waked for each.

    While the client reads as fast as we write, the server's `send` never waits, so its coroutine can be run on the spot.
    Where it does wait, a task carries it on, and pieces that come meanwhile follow.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._held: list[bytes] = []
        self._catching_up: asyncio.Task[None] | None = None

    def write(self, data: bytes) -> None:
        if not data:  # a token may add no character
            return
        if self._catching_up is not None:
            self._held.append(data)
            return
        sending: Any = self._send({"type": "http.response.body", "body": data, "more_body": True})
        try:
            waits_for = sending.send(None)
        except StopIteration:
            return
        self._catching_up = asyncio.ensure_future(self._catch_up(_rest(sending, waits_for)))

    async def end(self) -> None:
        """Nothing follows."""
        if self._catching_up is not None:
            await self._catching_up
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def close(self) -> None:
        """Give up what has not been sent."""
        if self._catching_up is not None:
            self._catching_up.cancel()

    async def _catch_up(self, first: Coroutine[Any, Any, None]) -> None:
        await first
        while self._held:
            data, self._held = b"".join(self._held), []
            await self._send({"type": "http.response.body", "body": data, "more_body": True})
        self._catching_up = None


@types.coroutine
def _rest(begun: Coroutine[Any, Any, None], waits_for: Any) -> Generator[Any, Any, None]:
    """A coroutine from where it began to wait: a task can only take one from its start."""
    yield waits_for
    yield from begun
