"""The bodies of streamed responses, written together for all clients at the end of a turn of the event loop."""

from __future__ import annotations

import asyncio
import logging
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any

from starlette.types import Send

log = logging.getLogger(__name__)


def never(_: bytes) -> bool:
    """Where nothing can be written but by `send`."""
    return False


class Outbox:
    """Bodies that have something to send.

    What a step brought is made into events of all its requests first, and then written, one right after the other: writing
    wakes a client, and clients that are waked with pauses between them cost the writer twice as much.
    """

    def __init__(self) -> None:
        self._bodies: list[Body] = []

    def add(self, body: Body) -> None:
        if not self._bodies:
            asyncio.get_running_loop().call_soon(self._flush)
        self._bodies.append(body)

    def _flush(self) -> None:
        bodies, self._bodies = self._bodies, []
        for body in bodies:
            try:
                body.flush()
            except Exception:  # of this client alone
                log.exception("an answer goes no further: it could not be written")
                body.close()


class Body:
    """Pieces of a body, sent from whatever code has them: no task has to be waked for each.

    send      the server's; while the client reads as fast as we write it never waits, and its coroutine can be run on the
              spot. Where it does wait, a task carries it on, and pieces that come meanwhile follow.
    at_once   does the same without a coroutine where it can; False: it has done nothing
    """

    def __init__(self, send: Send, outbox: Outbox, at_once: Callable[[bytes], bool] = never) -> None:
        self._send, self._outbox, self._at_once = send, outbox, at_once
        self._held: list[bytes] = []
        self._catching_up: asyncio.Task[None] | None = None
        self._is_closed = False

    def write(self, data: bytes) -> None:
        if not data or self._is_closed:  # a token may add no character
            return
        if not self._held and self._catching_up is None:
            self._outbox.add(self)
        self._held.append(data)

    def flush(self) -> None:
        """Send what there is; the client may be too slow for that, and then it follows."""
        if not self._held or self._catching_up is not None:
            return
        data = self._taken()
        if self._at_once(data):
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
        await self._send({"type": "http.response.body", "body": self._taken(), "more_body": False})

    def close(self) -> None:
        """Give up what has not been sent."""
        self._is_closed = True
        self._held.clear()
        if self._catching_up is not None:
            self._catching_up.cancel()

    async def _catch_up(self, first: Coroutine[Any, Any, None]) -> None:
        await first
        while self._held:
            await self._send({"type": "http.response.body", "body": self._taken(), "more_body": True})
        self._catching_up = None

    def _taken(self) -> bytes:
        data = b"".join(self._held)
        self._held.clear()
        return data


@types.coroutine
def _rest(begun: Coroutine[Any, Any, None], waits_for: Any) -> Generator[Any, Any, None]:
    """A coroutine from where it began to wait: a task can only take one from its start."""
    yield waits_for
    yield from begun
