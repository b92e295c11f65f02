"""Engines over one target share its slots: none may wait for another that nobody steps."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, ref

from dspark.errors import OutOfSlots
from dspark.target.kv_cache import KVCache

if TYPE_CHECKING:
    from dspark.engine.engine import Engine


class Neighbours:
    """The engines that have stepped over one slot cache. They take turns, and this is asked and told within a turn."""

    def __init__(self) -> None:
        self._threads: WeakKeyDictionary[Engine, int] = WeakKeyDictionary()  # that stepped each one last
        self._last: ref[Engine] | None = None

    def note_step(self, engine: Engine) -> None:
        self._threads[engine], self._last = threading.get_ident(), ref(engine)

    def make_way(self, engine: Engine) -> bool:
        """Whether slots were given back for an engine with requests none of which can begin.

        At its second try in a row: until then others may still be stepped in between. What this thread stepped before
        it cannot step while it waits here, so that is set aside. Raises OutOfSlots where nobody is left to wait for.
        """
        if self._last is None or self._last() is not engine:
            return False
        holders = [other for other in self._threads if other is not engine and other.batcher.running]
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
