"""Beliefs in a file, so that a server that starts again goes on from what it had learned."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from dspark.budget.beliefs import LiveBeliefs
from dspark.errors import CheckpointError
from dspark.types import StepRecord

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_SAVES = 300.0


class KeptBeliefs:
    """Reads the file at once and writes it as an observer of steps, every few minutes, and when told to.

    Neither a file that cannot be used nor a disk that cannot be written costs a request: one line in the log says so.
    """

    def __init__(self, beliefs: LiveBeliefs, path: Path | None = None, seconds: float = _SECONDS_BETWEEN_SAVES) -> None:
        self.beliefs, self.path, self.seconds = beliefs, path or usual_path(beliefs.identity), seconds
        self._saved_at, self._has_warned = time.monotonic(), False
        if self.path.exists():
            try:
                beliefs.load(self.path)
                log.info("beliefs about drafts go on from %s", self.path)
            except CheckpointError as error:
                log.warning("%s", error)

    def __call__(self, record: StepRecord) -> None:
        if time.monotonic() - self._saved_at > self.seconds:
            self.save()

    def save(self) -> None:
        self._saved_at = time.monotonic()
        try:
            self.beliefs.save(self.path)
        except OSError as error:
            if not self._has_warned:
                log.warning("beliefs about drafts cannot be kept in %s: %s", self.path, error.strerror)
                self._has_warned = True


def usual_path(identity: str) -> Path:
    """Where beliefs about this target and drafter are kept: a folder of the user's caches (XDG base directories)."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "dspark" / "beliefs" / f"{identity}.json"
