"""Before any route: an id for every request, the key, size and nesting of the body. After it: one line in the log."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
import uuid
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dspark.serve.faults import ApiError
from dspark.serve.nesting import check_nesting
from dspark.serve.settings import ServeSettings

log = logging.getLogger("dspark.access")

LOCKED = ("/v1/", "/tokenize", "/detokenize")  # what a key is asked for
_SANE_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Gate:
    """ASGI middleware. Routes may put fields for the log into `request.state.log`.

    A response that has begun may go on by `request.state.send_on`, past what only looks at its start: everything between a
    route and the socket would be called for every event of a stream.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self.app, self.settings = app, settings
        self._keys = [key.encode() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        fields: dict[str, Any] = {}
        scope.setdefault("state", {}).update(request_id=request_id, log=fields, send_on=send)
        status, began = 0, time.monotonic()
        # What GET would say, of which uvicorn sends the head: load balancers look whether a server is there by it.
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            self._check_key(scope, headers)
            receive = await self._read_body(headers, receive)
            await self.app(inner, receive, send_with_id)
        except ApiError as error:
            await error.response()(scope, receive, send_with_id)
        finally:
            line = {"request_id": request_id, "method": scope["method"], "path": scope["path"]}
            line |= {"status": status or 499, "seconds": round(time.monotonic() - began, 4), **fields}
            log.info("request", extra={"fields": line})

    def _check_key(self, scope: Scope, headers: dict[str, str]) -> None:
        if not self._keys or scope["method"] == "OPTIONS" or not scope["path"].startswith(LOCKED):
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1")
        # Every key is compared, in constant time: how long it takes tells nothing about any of them.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        if kind.lower() != "bearer" or not any(matches):
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")

    async def _read_body(self, headers: dict[str, str], receive: Receive) -> Receive:
        """Read the whole body within the limits; a `receive` that gives it in one piece, and then what else comes."""
        limit = self.settings.max_body_bytes
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > limit:
            raise _too_large(limit)
        if declared == "0" and "transfer-encoding" not in headers:
            return receive
        try:
            body = await asyncio.wait_for(_whole_body(receive, limit), self.settings.body_seconds)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body did not come within {self.settings.body_seconds:g} seconds") from None
        check_nesting(body, "the body")
        whole: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def replay() -> Message:
            nonlocal whole
            if whole is not None:
                message, whole = whole, None
                return message
            return await receive()

        return replay


async def _whole_body(receive: Receive, limit: int) -> bytes:
    body, more = bytearray(), True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message["type"] != "http.disconnect" and message.get("more_body", False)
        if len(body) > limit:
            raise _too_large(limit)
    return bytes(body)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit} bytes, the most this server takes", code="body_too_large")
