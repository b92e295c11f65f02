"""The chat page: self-contained, and made for this API."""

from __future__ import annotations

import re

import httpx


def test_the_page_loads_nothing_from_elsewhere(served):
    reply = httpx.get(served.url + "/")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert not re.findall(r"""(?:src|href|url|@import)\s*[=(]\s*["']?\s*(?:https?:)?//""", reply.text)
    assert "innerHTML" not in reply.text  # what a model writes is text, never markup
    assert "v1/chat/completions" in reply.text
