"""Engines over one target share its slots: none may wait for another that nobody steps."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, ref

from dspark.errors import OutOfSlots
from dspark.target.kv_cache import KVCache

if TYPE_CHECKING:
    from dspark.engine.engine import Engine

# Steps in a row without a slot. Who steps several engines by turns, even at random, hardly ever takes so many of one.
_PATIENCE = 16


class Neighbours:
    """The engines that have stepped over one slot cache. They take turns, and this is asked and told within a turn."""

    def __init__(self) -> None:
        self._threads: WeakKeyDictionary[Engine, int] = WeakKeyDictionary()  # that stepped each one last
        self._last: ref[Engine] | None = None
        self._last_thread = 0  # in which it was stepped
        self._num_tries = 0  # of the last one, in a row

    def note_step(self, engine: Engine) -> None:
        thread = threading.get_ident()
        is_as_before = self._last is not None and self._last() is engine and self._last_thread == thread
        if not is_as_before:
            self._threads[engine], self._last, self._last_thread = thread, ref(engine), thread

    def make_way(self, engine: Engine) -> bool:
        """Whether slots were given back for an engine with requests none of which can begin.

        Not at its first tries: others may still be stepped in between. What this thread stepped before it cannot step
        while it waits here, so that is set aside. Raises OutOfSlots where nobody is left to wait for.
        """
        is_same = self._last is not None and self._last() is engine
        self._num_tries = self._num_tries + 1 if is_same else 1
        if self._num_tries < _PATIENCE:
            return False
        self._num_tries = 0
        others = [other for other in self._threads if other is not engine]
        holders = [other for other in others if other.batcher.running or other.scoring.is_under_way]
        if not holders:
            cache = engine.target.cache
            raise OutOfSlots(
                f"{cache.limit - cache.num_free_slots} of {cache.limit} slots belong to requests of no "
                "engine that is still there, and too few are left to begin with: release them (target.release(id) for "
                "the ids in target.cache.request_ids), or load the target anew"
            )
        idle = [other for other in holders if self._threads[other] == threading.get_ident()]
        for other in idle:
            other.set_aside()
        return bool(idle)


_neighbours: WeakKeyDictionary[KVCache, Neighbours] = WeakKeyDictionary()


def neighbours_over(cache: KVCache) -> Neighbours:
    """Those who share this cache."""
    if cache not in _neighbours:
        _neighbours[cache] = Neighbours()
    return _neighbours[cache]
