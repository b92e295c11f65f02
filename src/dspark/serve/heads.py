"""HTTP/1.1 as uvicorn speaks it, with bounds on what comes before a body: the parser would keep any length, for ever."""

from __future__ import annotations

import asyncio
import http
import json

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from dspark.serve.faults import ApiError

MOST_BYTES = 2**16  # and what one read brings besides
SECONDS = 30.0


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
