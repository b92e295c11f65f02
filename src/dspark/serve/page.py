"""The chat page at `/`: one self-contained file that talks to this server as any client does."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

# Nothing from elsewhere is loaded, and the page may talk to nobody but its own server.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'"
)

router = APIRouter()


@router.get("/", response_class=HTMLResponse, include_in_schema=False)
async def page() -> HTMLResponse:
    """Try the model in a browser."""
    text = files("dspark.serve").joinpath("chat.html").read_text(encoding="utf-8")
    return HTMLResponse(text, headers={"content-security-policy": _POLICY, "x-frame-options": "DENY"})
