"""`/dashboard`: the numbers of `/metrics` on one page that needs nothing else, live by server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.resources import files
from typing import Any

from dspark.errors import DSparkError, EngineLost

try:
    from fastapi import APIRouter
    from fastapi.responses import HTMLResponse, StreamingResponse
except ImportError as error:
    raise DSparkError('the dashboard needs FastAPI: pip install "dspark[serve]"') from error

# Whatever a snapshot holds, the page can load and send nothing but its own events.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


def make_dashboard(
    source: Callable[[], Awaitable[dict[str, Any]]],
    interval_seconds: float = 1.0,
    is_ending: Callable[[], bool] = lambda: False,
) -> APIRouter:
    """A router with the page and its events; every event is one `await source()` as JSON (monitor/snapshot.py).

    is_ending   asked before every event: the stream closes when the server shuts down instead of holding it up
    """
    router = APIRouter(include_in_schema=False)
    page = files("dspark.serve").joinpath("dashboard.html").read_text(encoding="utf-8")

    @router.get("/dashboard")
    async def dashboard() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY, "X-Frame-Options": "DENY"})

    @router.get("/dashboard/events")
    async def events(once: bool = False) -> StreamingResponse:
        """Without end, or with ?once=1 a single event."""

        async def stream() -> AsyncIterator[str]:
            while not is_ending():
                try:
                    snapshot = await source()
                except EngineLost:
                    return  # in the midst of asking it
                yield f"data: {json.dumps(snapshot, allow_nan=False)}\n\n"
                if once:
                    return
                await asyncio.sleep(interval_seconds)

        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(stream(), media_type="text/event-stream", headers=headers)

    return router
