"""How much longer a step with drafts takes than a plain one, from steps of both kinds that lay next to each other.

What either kind costs is learned at different times, and a machine that became slower in between makes the kind that was
timed last look dear. The ratio of neighbours does not know how fast the machine is.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dspark.budget.capacity import Capacity
from dspark.budget.fares import about_as_long
from dspark.types import Load, StepRecord

_NEIGHBOURS = 12  # steps that a pair may lie apart
_LONGEST_RUN = 5  # steps that stand for a run of their kind, by their median
_UNSETTLED = 5  # plain steps of one request after drafts, until they find in the processor's caches what they need
_AFTER_PROMPTS = 2  # of these, a prompt that was read spares the next step so many
_MOST_PAIRS = 12
_MOST_UNREAD = 16  # positions per request
_ABSURD = math.log(30)  # a clock that jumped, or a machine that slept
_NEAR = 2  # places of _Kind.requests: half or twice as many requests
_PRIOR = 1.0  # pairs' worth of trust in what steps cost by themselves


class _Kind(NamedTuple):
    """Steps that are compared with each other: about so many requests, how often they were halved to draft for, and about
    how much lies before each.
    """

    requests: int
    halvings: int | None  # None: a plain step
    context: int = 0


class _Step(NamedTuple):
    now: int
    tokens: int
    asked: int
    context: int
    seconds: float


class _Pair(NamedTuple):
    ratio: float  # log of drafted over plain seconds
    tokens: float  # that the drafted steps read
    asked: float  # requests that they drafted for
    context: float  # tokens before all of them


class _Columns(NamedTuple):
    """Pairs of a kind, by rising tokens."""

    ratios: NDArray[np.float64]
    sizes: NDArray[np.int64]  # 0 for a plain step, then what the drafted ones read
    asked: float  # on average
    context: float  # likewise


class SideBySide:
    """Pairs of a plain step and one with drafts, by the number of requests and the share of them that was drafted for."""

    def __init__(self) -> None:
        self._pairs: dict[_Kind, deque[_Pair]] = {}
        self._columns: dict[_Kind, _Columns] = {}  # the same for who asks
        self._kind: _Kind | None = None  # of the last steps
        self._run: deque[_Step] = deque(maxlen=_LONGEST_RUN)  # but for the first ones after the other kind
        self._before: tuple[_Kind | None, deque[_Step]] = (None, deque())  # the run of another kind before this one
        self._is_compared = False  # with the one before it
        self._is_plain: bool | None = None  # the last steps, whatever their number of requests
        self._place = _AFTER_PROMPTS  # of the last step among these
        self._now = 0

    def observe(self, record: StepRecord) -> None:
        """Compare a step with those of the other kind just before it; steps that read prompts are left out."""
        self._now += 1
        load, seconds, n = record.load, sum(record.seconds.values()), len(record.request_ids)
        # After a while without drafts there is much to read, once: that says nothing of the steps to come.
        is_usual = record.num_unread <= _MOST_UNREAD * record.num_asked
        if load is not None and load.num_prompt_tokens:
            self._place, self._is_plain = _AFTER_PROMPTS, None  # whatever comes next, it finds the target in the caches
        if load is None or load.num_prompt_tokens or not n or not seconds > 0:
            return
        is_plain = not record.num_asked
        self._place = self._place + 1 if self._is_plain in (is_plain, None) else 0
        self._is_plain = is_plain
        if not is_usual:
            return
        kind = _kind(n, record.num_asked, load.context_tokens)
        if kind != self._kind:
            self._compare_runs()
            self._before = self._kind, self._run
            self._kind, self._run, self._is_compared = kind, deque(maxlen=_LONGEST_RUN), False
        if self._place >= (num_unsettled(n) if is_plain else 1):
            self._run.append(_Step(self._now, record.num_tokens, record.num_asked, load.context_tokens, seconds))
            if len(self._run) == _LONGEST_RUN:
                self._compare_runs()

    def skip(self) -> None:
        """A step like the one before it, which says no more."""
        self._now += 1
        self._place += 1

    def num_pairs(self, num_requests: int) -> int:
        """How many are remembered of about so many requests."""
        about = _place(num_requests)
        return sum(len(pairs) for kind, pairs in self._pairs.items() if kind.requests == about)

    def excess(self, capacity: Capacity, load: Load, num_asked: int) -> float:
        """How many times dearer, beside plain ones, steps with so many drafts are than `capacity` has it; 1: not known.

        Where nothing was compared yet with about so many requests, it is as with somewhat more or fewer, or else as with
        another share of them drafted for: a share that was never tried would look cheap beside one that was.
        """
        requests, halvings, lies_before = _kind(load.num_requests, num_asked, load.context_tokens)
        near = [k for k in self._pairs if abs(k.requests - requests) <= _NEAR]
        if not near or not capacity.is_known:
            return 1.0
        gaps = [
            (abs((k.halvings or 0) - (halvings or 0)), abs(k.context - lies_before), abs(k.requests - requests))
            for k in near
        ]
        (*_, distance), nearest = min(zip(gaps, near, strict=True))
        n = round(2 ** (nearest.requests / 2)) if distance else load.num_requests
        if nearest not in self._columns:
            self._columns[nearest] = _columns(self._pairs[nearest])
        ratios, sizes, asked, mean_context = self._columns[nearest]
        context = round(mean_context)
        num_asked = max(1, round(asked))
        seconds = capacity.seconds(np.maximum(sizes, n), n, context)
        drafting = capacity.draft_seconds(num_asked, round(context * min(1.0, num_asked / n)))
        errors = sorted((ratios - np.log((seconds[1:] + drafting) / seconds[0])).tolist())
        cut, num = (len(errors) + 2) // 5, len(errors)
        middle = errors[cut : num - cut]
        return math.exp(sum(middle) / len(middle) * num / (num + _PRIOR * (1 + distance)))

    def _compare_runs(self) -> None:
        """The last steps, once there are enough of them or no more, with those of the kind before."""
        before, steps = self._before
        if self._is_compared or not self._run or not steps or before is None or self._kind is None:
            return
        self._is_compared = True
        if self._run[0].now - steps[-1].now <= _NEIGHBOURS:
            self._compare(before, list(steps), self._kind, list(self._run))

    def _compare(self, kind: _Kind, steps: list[_Step], other: _Kind, others: list[_Step]) -> None:
        if (kind.requests, kind.context) != (other.requests, other.context) or (kind.halvings is None) == (
            other.halvings is None
        ):
            return
        if kind.halvings is None:
            kind, steps, others = other, others, steps
        ratio = math.log(_median(steps) / _median(others))
        if abs(ratio) > _ABSURD:
            return
        tokens, asked, context = (
            sum(getattr(s, f) for s in steps) / len(steps) for f in ("tokens", "asked", "context")
        )
        self._columns.pop(kind, None)
        self._pairs.setdefault(kind, deque(maxlen=_MOST_PAIRS)).append(_Pair(ratio, tokens, asked, context))


def num_unsettled(num_requests: int) -> int:
    """Plain steps after drafts that take longer than those to come: of many requests a step has more of its own to fetch."""
    return max(1, round(_UNSETTLED / math.sqrt(num_requests)))


@lru_cache(maxsize=1024)
def _place(num_requests: int) -> int:
    return round(2 * math.log2(num_requests))


def _kind(num_requests: int, num_asked: int, context_tokens: int) -> _Kind:
    halvings = round(math.log2(num_requests / num_asked)) if num_asked else None
    return _Kind(_place(num_requests), halvings, about_as_long(context_tokens // num_requests))


def _columns(pairs: Iterable[_Pair]) -> _Columns:
    ratios, tokens, asked, context = zip(*sorted(pairs, key=lambda pair: pair.tokens), strict=True)
    sizes = np.array([0, *map(round, tokens)])
    return _Columns(np.array(ratios), sizes, sum(asked) / len(asked), sum(context) / len(context))


def _median(steps: list[_Step]) -> float:
    return statistics.median(s.seconds for s in steps)
