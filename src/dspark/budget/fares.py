"""How drafts have fared, by request and by kind of request: what the guard goes by."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence, Set
from dataclasses import dataclass
from itertools import chain, compress, islice

import numpy as np
from numpy.typing import NDArray

from dspark.types import StepRecord

Floats = NDArray[np.float64]

_MOST_REQUESTS, _MOST_KINDS = 1024, 64
_LATELY = 64  # drafts
_LIKE_OTHERS = 4.0  # drafts of others that count beside a request's own, or the luckiest would be taken for the best
_OTHERS = 24  # requests drafted for last, by which others of their kind are judged
_OTHERS_HALF_LIFE = 8.0  # requests
_BY_AGE = [0.5 ** (age / _OTHERS_HALF_LIFE) for age in range(_OTHERS)]
_STALE = 0.25  # what a request counts whose drafts are older than the memory
_LONG_RUN = 12  # drafts
_UNKNOWN = 0.6, 1.5  # times the tokens that texts usually get: how two more may do than those that are known
_TRUST_PRIOR, _FOUND_PRIOR = 24.0, 8.0  # draft tokens, drafts: as if all had come true before
_COUNT_MEMORY = 400.0  # of them


@dataclass
class _Fare:
    """One request's drafts: (step, survival) of the last ones, how many count, and accepted tokens promised by each."""

    rows: deque[tuple[int, Sequence[float]]]
    kind: Hashable = None
    num: int = 0
    promise: float = 0.0

    def add(self, now: int, row: Sequence[float], memory: int) -> None:
        if self.rows and now - self.rows[-1][0] > memory:
            self.num = 0
        self.rows.append((now, row))
        self.num += 1
        self.promise += (sum(row) - self.promise) / min(self.num, _LONG_RUN)


class Fares:
    """What drafts were believed to give, and gave, lately.

    num_remembered  drafts of each request that are remembered
    memory          steps after which a draft says no more of its request than others say
    """

    def __init__(self, num_remembered: int, memory: int) -> None:
        self._num_remembered, self._memory = num_remembered, memory
        self._by_request: OrderedDict[int, _Fare] = OrderedDict()
        self._lately: deque[tuple[int, Sequence[float]]] = deque(maxlen=_LATELY)
        self._trust: dict[Hashable, tuple[float, float]] = {}  # by kind: draft tokens accepted, and promised
        self._found: dict[Hashable, tuple[float, float]] = {}  # by kind: drafts that had a token, and all asked for

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._by_request

    def num_known(self, request_ids: Sequence[int]) -> int:
        """How many of them were drafted for lately."""
        return sum(map(self._by_request.__contains__, request_ids))

    def order(self) -> dict[int, int]:
        """Requests by when they were drafted for last: the smallest number longest ago."""
        return {request_id: n for n, request_id in enumerate(self._by_request)}

    def learn(self, now: int, record: StepRecord, asked: Set[int], kinds: dict[int, Hashable]) -> None:
        """Of a step: the requests that were drafted for (asked), and their kinds."""
        nothing = [[0.0]] * len(record.request_ids)
        survival: list[list[float]] = nothing if record.survival is None else record.survival.tolist()
        kept = nothing if record.kept is None else record.kept.tolist()
        for b, request_id in enumerate(record.request_ids):
            if request_id not in asked:
                continue
            kind, has_found = kinds.get(request_id), record.drafted[b] > 0
            _count(self._found, kind, has_found, 1, _FOUND_PRIOR)
            if has_found:
                self._remember(now, request_id, kind, survival[b])
                _count(self._trust, kind, record.accepted[b], sum(compress(survival[b], kept[b])), _TRUST_PRIOR)

    def trust(self, kind: Hashable = None) -> float:
        """Accepted draft tokens for each that beliefs had promised, lately, to requests of this kind."""
        accepted, promised = self._trust.get(kind) or (_overall(self._trust), 1.0)
        return min(1.5, accepted / promised)

    def share_found(self, kinds: Sequence[Hashable]) -> float:
        """Of drafts asked for: how many have a token. Whoever seldom finds one asks in vain, and in bursts finds many: what
        drafts are worth is told by those that were found.
        """
        shares = (self._found.get(kind, (1.0, 1.0)) for kind in kinds)
        return sum(found / asked for found, asked in shares) / len(kinds)

    def samples(self, now: int, request_ids: Sequence[int], kinds: Sequence[Hashable]) -> Floats:
        """[n, B, K]  what the last drafts promised, newest first, each request's own; others' where it has too few.

        Scaled so that each request promises what its drafts have promised in the long run, drawn towards all.
        """
        num = max(1, self._num_remembered // len(request_ids))
        since = now - self._memory
        pool = [row for _, row in self._lately] or [[0.0]]
        width = max(map(len, pool))
        samples = np.zeros((len(request_ids), num, width))
        rows: list[Sequence[float]] = []
        usual = {kind: self._usual(now, kind) for kind in {*kinds}}
        long_run = np.array([usual[kind] for kind in kinds])
        for b, request_id in enumerate(request_ids):
            fare = self._by_request.get(request_id)
            newest = () if fare is None else islice(reversed(fare.rows), num)
            own = [row for when, row in newest if when > since]
            if fare is not None and own:
                num_own = min(fare.num, _LONG_RUN)
                long_run[b] = (num_own * fare.promise + _LIKE_OTHERS * long_run[b]) / (num_own + _LIKE_OTHERS)
            rows += (row[:width] for row in own)
            rows += (pool[-1 - (b + n) % len(pool)] for n in range(len(own), num))
        lengths = np.array([len(row) for row in rows]).reshape(len(request_ids), num, 1)
        samples[np.arange(width) < lengths] = [*chain.from_iterable(rows)]
        samples = samples.swapaxes(0, 1)
        promised = np.maximum(samples.sum(2).mean(0), 1e-9)
        trust = np.array([self.trust(kind) for kind in kinds])
        return np.minimum(samples * (trust * long_run / promised)[:, None], 1.0)

    def ease(self, kinds: Sequence[Hashable]) -> Floats:
        """[n]  what rounds with drafts of single texts of these kinds give, in what such rounds usually give."""
        alike = [fare for kind in {*kinds} for fare in self._alike(kind)]
        usual = sum(fare.promise for fare in alike) / max(1, len(alike))
        own = np.array([min(fare.num, _LONG_RUN) for fare in alike])
        promise = np.array([fare.promise for fare in alike])
        known = 1 + (promise - usual) * own / (own + _LIKE_OTHERS) / (1 + usual)
        return np.concatenate([known, _UNKNOWN])

    def _alike(self, kind: Hashable) -> list[_Fare]:
        """Those drafted for last, newest first: of this kind if there are any."""
        newest = list(islice(reversed(self._by_request.values()), _OTHERS))
        return [fare for fare in newest if fare.kind == kind] or newest

    def _usual(self, now: int, kind: Hashable) -> float:
        """Accepted tokens promised by a draft of requests of this kind, by those drafted for last."""
        alike = self._alike(kind)
        total = weights = 0.0
        for age, fare in enumerate(alike):
            num = min(fare.num, _LONG_RUN)
            weight = _BY_AGE[age] * num / (num + _LIKE_OTHERS)
            if now - fare.rows[-1][0] > self._memory:
                weight *= _STALE
            total, weights = total + weight * fare.promise, weights + weight
        return total / weights if weights else 0.0

    def _remember(self, now: int, request_id: int, kind: Hashable, row: Sequence[float]) -> None:
        if request_id not in self._by_request:
            rows: deque[tuple[int, Sequence[float]]] = deque(maxlen=self._num_remembered)
            self._by_request[request_id] = _Fare(rows, kind)
        self._by_request[request_id].add(now, row, self._memory)
        self._by_request.move_to_end(request_id)
        if len(self._by_request) > _MOST_REQUESTS:
            self._by_request.popitem(last=False)
        self._lately.append((now, row))


def _count(counts: dict[Hashable, tuple[float, float]], kind: Hashable, yes: float, all: float, prior: float) -> None:
    """Add to what is counted of a kind; old counts fade."""
    if kind not in counts:
        counts[kind] = prior * _overall(counts), prior
    before, all_before = counts[kind]
    fade = min(1.0, _COUNT_MEMORY / all_before)
    counts[kind] = (before * fade + yes, all_before * fade + all)
    if len(counts) > _MOST_KINDS:
        del counts[next(iter(counts))]


def _overall(counts: dict[Hashable, tuple[float, float]]) -> float:
    """Share over all kinds, by which a new one is judged at first; 1 before there are any."""
    yes, all = (sum(count[i] for count in counts.values()) for i in (0, 1))
    return yes / all if all else 1.0
