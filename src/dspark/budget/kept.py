"""What an engine learns while serving, in files, so that a server that starts again goes on from there."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dspark import caches
from dspark.budget import capacity as costs
from dspark.budget.beliefs import LiveBeliefs
from dspark.budget.capacity import Capacity
from dspark.errors import CheckpointError
from dspark.types import StepRecord

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_SAVES = 300.0


class Kept:
    """Has a file written as an observer of steps, every few minutes, and when told to.

    A disk that cannot be written costs no request: one line in the log says so.

    what   how that line names it
    write  writes it to a path
    """

    def __init__(
        self, what: str, write: Callable[[Path], Any], path: Path, seconds: float = _SECONDS_BETWEEN_SAVES
    ) -> None:
        self.what, self.path, self.seconds, self._write = what, path, seconds, write
        self._saved_at, self._has_warned = time.monotonic(), False

    def __call__(self, record: StepRecord) -> None:
        if time.monotonic() - self._saved_at > self.seconds:
            self.save()

    def save(self) -> None:
        """Write the file now."""
        self._saved_at = time.monotonic()
        try:
            self._write(self.path)
        except OSError as error:
            if not self._has_warned:
                log.warning("%s cannot be kept in %s: %s", self.what, self.path, error.strerror)
                self._has_warned = True


def keep_beliefs(beliefs: LiveBeliefs, path: Path | None = None) -> Kept:
    """Go on from what is in the file, if it can be used, and keep what is learned there."""
    path = path or usual_path(beliefs.identity)
    if path.exists():
        try:
            beliefs.load(path)
            log.info("beliefs about drafts go on from %s", path)
        except CheckpointError as error:
            log.warning("%s", error)
    return Kept("beliefs about drafts", beliefs.save, path)


def keep_costs(capacity: Capacity) -> Kept:
    """Keep what steps cost where engines of this kind look for it when they start."""
    return Kept("costs of steps", capacity.save, costs.usual_path(capacity.fingerprint))


def usual_path(identity: str) -> Path:
    """Where beliefs about this target and drafter are kept: a folder of the user's caches (XDG base directories)."""
    return caches.folder() / "beliefs" / f"{identity}.json"
