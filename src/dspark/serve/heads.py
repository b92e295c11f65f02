"""HTTP/1.1 as uvicorn speaks it, with bounds on what comes before a body: the parser would keep any length, for ever."""

from __future__ import annotations

import asyncio
import http
import json
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from dspark.serve.faults import ApiError

MOST_BYTES = 2**16  # and what one read brings besides
SECONDS = 30.0


def write_chunk(cycle: RequestResponseCycle, data: bytes) -> bool:
    """A piece of a body as `cycle.send` would write it, for a fraction of what that takes; False: not now, or not as a chunk."""
    if not cycle.chunked_encoding or cycle.flow.write_paused:
        return False
    if not cycle.disconnected:
        cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
    return True


def unframed(cycle: RequestResponseCycle) -> Callable[[Any], Coroutine[Any, Any, None]]:
    """Its `send` for HTTP/1.0, which knows no chunks: a body whose length is not said ends with the connection."""
    framed, has_length = cycle.send, True

    async def send(message: Any) -> None:
        nonlocal has_length
        if message["type"] == "http.response.start":
            has_length = any(name.lower() == b"content-length" for name, _ in message["headers"])
            if not has_length:
                cycle.chunked_encoding, cycle.expected_content_length = False, sys.maxsize
        elif not (has_length or message.get("more_body")):
            cycle.expected_content_length = len(message["body"])
        await framed(message)

    return send


class BoundedHeads(HttpToolsProtocol):
    """Refuses a request line and headers (a head) that are too long, and closes connections whose head does not come."""

    _is_reading_head, _num_bytes = True, 0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._begin_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()
        self.scope["state"]["at_once"] = partial(write_chunk, self.cycle)
        if self.scope["http_version"] == "1.0":
            self.cycle.send = unframed(self.cycle)  # type: ignore[assignment]  # only the shapes of messages

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_reading_head and not self.transport.is_closing():
            self._num_bytes += len(data)
            if self._num_bytes > MOST_BYTES:
                self._refuse(
                    ApiError(431, f"the headers are larger than {MOST_BYTES} bytes, the most this server takes")
                )

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls where something is no HTTP."""
        self._refuse(ApiError(400, msg))

    def _begin_head(self) -> None:
        self._end_head()
        self._is_reading_head, self._num_bytes = True, 0
        self._timer = self.loop.call_later(SECONDS, self.transport.close)

    def _end_head(self) -> None:
        self._is_reading_head = False
        if self._timer is not None:
            self._timer.cancel()

    def _refuse(self, error: ApiError) -> None:
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if not is_answering:  # else it would be read as a part of that answer
            body = json.dumps(error.body).encode()
            head = f"HTTP/1.1 {error.status} {http.HTTPStatus(error.status).phrase}\r\nconnection: close\r\n"
            head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            self.transport.write(head.encode() + body)
        self.transport.close()
