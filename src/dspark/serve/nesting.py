"""How deeply JSON from outside may be nested: a bound of our own, since parsers have others, or none, on each machine."""

from __future__ import annotations

import re
from itertools import accumulate

from dspark.serve.faults import ApiError

MOST_LEVELS = 100
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)  # to the end where it never ends: each byte is read once
_OPENING, _CLOSING = b"[{", b"]}"
_STEPS = [(byte in _OPENING) - (byte in _CLOSING) for byte in range(256)]
_OTHERS = bytes(byte for byte in range(256) if not _STEPS[byte])


def check_nesting(data: bytes, what: str) -> None:
    """Raises ApiError for JSON in which arrays and objects are nested more than MOST_LEVELS deep; other text may pass."""
    if sum(map(data.count, (b"[", b"{"))) <= MOST_LEVELS:  # as nearly all have
        return
    brackets = _STRING.sub(b"", data).translate(None, _OTHERS)
    if max(accumulate(map(_STEPS.__getitem__, brackets)), default=0) > MOST_LEVELS:
        raise ApiError(400, f"{what} is nested more than {MOST_LEVELS} levels deep, the most this server takes")
