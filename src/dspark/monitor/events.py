"""What happened that somebody may want to look into: canaries that differ, drift, faults. One JSON object per line."""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
_MOST_BYTES = 10_000_000  # of one file; one older file is kept beside it


class EventLog:
    """Appends events to a file and remembers the last ones for the dashboard.

    path         a JSON lines file, rotated once it is large; None remembers only
    with_tokens  write token ids too: they can be turned back into what users wrote, so they are left out unless asked for
    """

    def __init__(self, path: str | Path | None = None, with_tokens: bool = False, num_recent: int = 100) -> None:
        self.with_tokens = with_tokens
        self.recent: deque[dict[str, Any]] = deque(maxlen=num_recent)
        self._file = None if path is None else RotatingFileHandler(path, maxBytes=_MOST_BYTES, backupCount=1)

    def write(self, event: str, /, tokens: dict[str, list[int]] | None = None, **facts: Any) -> None:
        """Note an event. `tokens` are what may give away a prompt or an answer."""
        entry = {"time": round(time.time(), 3), "event": event, **facts}
        self.recent.append(entry)
        if self._file is not None:
            line = json.dumps({**entry, **(tokens or {})} if self.with_tokens else entry)
            self._file.emit(logging.LogRecord(event, logging.INFO, "", 0, line, None, None))

    def close(self) -> None:
        """Write what is left and close the file."""
        if self._file is not None:
            self._file.close()
