"""What has been read once need not be read again: slots and features of past and present requests, by their tokens.

A conversation's next turn begins with all that was said before it, and many requests begin with the same system prompt.
Only committed tokens are kept, so a hit gives the target the very prefix that it would have read. Drafters get the
features of that prefix as if the target had just read it: acceptance is what it would have been.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dspark import pages
from dspark.target.kv_cache import KVCache
from dspark.types import FeaturePiece, Request

RUN = 16  # tokens that are found, shared and dropped together
_ON_A_SHELF = 64  # runs whose features get their memory at once


@dataclass(eq=False)
class _Run:
    """RUN tokens after those of `parent`, which is how they are found: by the tokens themselves, so there are no collisions.

    slots [RUN]        with the target's keys and values of these tokens at these positions
    features [RUN, F]  what drafters read of them; None where they read none
    """

    tokens: tuple[int, ...]
    parent: _Run | None
    slots: np.ndarray
    features: Tensor | None
    children: dict[tuple[int, ...], _Run] = field(default_factory=dict)
    num_users: int = 0


@dataclass(eq=False)
class _Held:
    """Of one running request: its runs from the start, and features of what it has read beyond them."""

    runs: list[_Run] = field(default_factory=list)
    pieces: list[FeaturePiece] = field(default_factory=list)


class _Shelves:
    """Memory for the features of runs, which the next run has once it is given back. As much as was ever needed at once."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def keep(self, features: Tensor) -> Tensor:
        """A copy of features [RUN, F], which are always of one width."""
        if not self._free:
            self._free += pages.zeros((_ON_A_SHELF * RUN, features.shape[1]), features).split(RUN)
        place = self._free.pop()
        place.copy_(features)
        return place

    def give_back(self, place: Tensor) -> None:
        self._free.append(place)


class PrefixCache:
    """Prefixes of one engine's requests in the slots of `cache`.

    max_tokens  kept at most beyond those of running requests; the least recently used go first

    A run in use by a request, and with it all runs before it, stays. The others give way to whoever needs their slots,
    which therefore count as free.
    """

    def __init__(self, cache: KVCache, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._cache = cache
        self._first: dict[tuple[int, ...], _Run] = {}
        self._idle: OrderedDict[_Run, None] = OrderedDict()  # least recently used first; children before their parents
        self._held: dict[int, _Held] = {}
        self._shelves = _Shelves()
        cache.lend_spare_slots_to(self)

    # -- for the engine --------------------------------------------------------------------------------------------------

    def attach(self, request: Request) -> Tensor | None:
        """Let a request that has no slots begin with what is known of its tokens; the features [n, F] of that.

        The last token is never taken from here: the target must read it to say what follows.
        """
        held = self._held[request.id] = _Held()
        children = self._first
        while (end := RUN * (len(held.runs) + 1)) < len(request.tokens):
            run = children.get(tuple(request.tokens[end - RUN : end]))
            if run is None:
                break
            self._use(held, run)
            children = run.children
        if not held.runs:
            return None
        request.num_cached = RUN * len(held.runs)
        self._cache.adopt(request.id, np.concatenate([run.slots for run in held.runs]))
        features = [run.features for run in held.runs if run.features is not None]
        return torch.cat(features) if features else None

    def note(self, request: Request, piece: FeaturePiece) -> None:
        """Remember features of the positions just committed. They are cut out when they fill a run."""
        if request.id in self._held:
            self._held[request.id].pieces.append(piece)

    def take_in(self, request: Request) -> None:
        """Let others find what a request has had committed since the last time, as far as it fills runs."""
        held = self._held.get(request.id)
        if held is None:
            return
        first = RUN * len(held.runs)
        # A request that ended inside an accepted draft has slots of tokens that are not its own.
        num_new = (min(request.num_cached, len(request.tokens)) - first) // RUN
        if num_new <= 0:
            return
        slots = self._cache.slots_of(request.id)[first : first + RUN * num_new].copy()
        features = torch.cat([piece.cut for piece in held.pieces]) if held.pieces else None
        for start in range(0, RUN * num_new, RUN):
            tokens = tuple(request.tokens[first + start : first + start + RUN])
            parent = held.runs[-1] if held.runs else None
            siblings = self._first if parent is None else parent.children
            if tokens not in siblings:
                own = None if features is None else self._shelves.keep(features[start : start + RUN])
                siblings[tokens] = _Run(tokens, parent, slots[start : start + RUN], own)
                self._cache.share(siblings[tokens].slots)
            self._use(held, siblings[tokens])
        held.pieces = []
        if features is not None:
            rest = features[RUN * num_new :].clone()
            held.pieces.append(FeaturePiece(rest, 0, len(rest)))

    def forget(self, request: Request) -> None:
        """The request gives its slots back. Its runs stay for others to find."""
        held = self._held.pop(request.id, None)
        for run in reversed(held.runs if held else ()):
            run.num_users -= 1
            if not run.num_users:
                self._idle[run] = None
        self._drop(max(0, len(self._idle) - self.max_tokens // RUN))

    # -- for the slot cache ----------------------------------------------------------------------------------------------

    @property
    def num_spare(self) -> int:
        """Slots that `give_back` would free."""
        return RUN * len(self._idle)

    def give_back(self, num_slots: int) -> None:
        """Free at least so many slots, or all that are spare."""
        self._drop(min(-(-num_slots // RUN), len(self._idle)))

    def retire(self) -> None:
        """Another cache takes over: keep nothing any more."""
        self.max_tokens = 0
        self._drop(len(self._idle))

    @property
    def slots(self) -> Iterator[np.ndarray]:
        """Of every run: what this cache owns."""
        waiting = list(self._first.values())
        while waiting:
            run = waiting.pop()
            waiting.extend(run.children.values())
            yield run.slots

    # -- bookkeeping -----------------------------------------------------------------------------------------------------

    def _use(self, held: _Held, run: _Run) -> None:
        self._idle.pop(run, None)
        run.num_users += 1
        held.runs.append(run)

    def _drop(self, num_runs: int) -> None:
        for _ in range(num_runs):
            run, _ = self._idle.popitem(last=False)
            # Whoever uses a run uses its parent, and lets go of it first: so it is always dropped first as well.
            assert not run.children and not run.num_users, "a run was dropped before one that continues it"
            del (self._first if run.parent is None else run.parent.children)[run.tokens]
            self._cache.give_up(run.slots)
            if run.features is not None:
                self._shelves.give_back(run.features)
