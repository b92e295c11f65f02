"""Seconds of a step by its size, learned from steps: robust, bounded, and true again soon after a machine changes.

The curve is a sum of terms that cannot be negative, so it never falls with more tokens, requests or context: a base,
ramps between neighbouring sizes (a staircase stays one), and terms for requests and context. It is fitted to medians of
what was measured, kept by place; a common speed factor follows the machine.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_MOST_PLACES = 256
_MEDIAN_OF = 9
_SPEED_FROM = 15  # ratios of steps to earlier ones at their places
_SPEED_EVERY = 3  # steps between looks at them
_SPEED_CHANGE = 0.12  # a smaller change of all is left to the medians
_MOST_BETWEEN_FITS, _FEWEST_BETWEEN_FITS = 256, 45  # a fit, with what is looked up in it, takes a fifth of a small step
_NEAR = 2  # places of size whose steps say what to expect of a new one
_HALF_AS_FRESH, _OLD = 50, 0.02  # steps; share
_PAST = 500  # steps after which what a place had shown is from another time, as all is that a file tells
_LATEST = 4  # places that are looked at to see whether the fit has become old
_ABSURD = 30.0  # times as long as believed: the machine slept or its clock jumped, unless it happens again and again
_LEAST_SECONDS = 1e-7  # what clocks that leap have taught may say 0, by which others divide
_SO_OFTEN = 5
_LARGEST = 1e12  # tokens or seconds: more is nothing that anybody measured
_KNOTS = np.array([*range(1, 9), *(round(8 * 2 ** (k / 4)) for k in range(1, 41))], dtype=float)  # 1 .. 8192
_KNOT_LIST = _KNOTS.tolist()
_GAPS = np.diff(_KNOTS)
_NUM_SMOOTH = 6  # terms before the ramps


@dataclass
class Place:
    """Steps of about one size: where they were on average, and the last few durations at speed 1.

    expected  seconds that the first one was expected to take; 0: nothing was known
    latest    how many steps had been observed, anywhere, when the last one here was
    is_fitted whether the last fit knew of it
    """

    size: float
    requests: float
    context: float
    expected: float = 0.0
    latest: int = 0
    is_fitted: bool = False
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=2 * _MEDIAN_OF))

    @property
    def num(self) -> int:
        """Of the latest steps here, by which others are judged."""
        return min(len(self.seconds), _MEDIAN_OF)

    def forget_all_but_last(self) -> None:
        """What comes now is to be believed soon: of two the shorter counts, of three the middle one."""
        while len(self.seconds) > 1:
            self.seconds.popleft()

    @property
    def median(self) -> float:
        """Seconds of the latest steps here."""
        return _shorter_median([*self.seconds][-_MEDIAN_OF:])

    @property
    def usual(self) -> float:
        """Seconds of the steps here before those, where there are enough: the latest are soon used to a change."""
        before = [*self.seconds][:-_MEDIAN_OF]
        if len(before) > _MEDIAN_OF // 2:
            return _shorter_median(before)
        return self.median if self.num == _MEDIAN_OF else self.expected


class _Table(NamedTuple):
    """Seconds at each knot without context, and per context token, at speed 1; and the same as lists."""

    flat: Floats
    per_context: Floats
    flat_list: list[float]
    per_context_list: list[float]


class _Measured(NamedTuple):
    """Of all places with about so many requests, beside what the terms say of them.

    context_places, num, freshness, excess [P]  the last is the log of measured over believed seconds
    nearness [P, knots]                         how much each says of each size
    """

    context_places: NDArray[np.int64]
    num: Floats
    freshness: Floats
    excess: Floats
    nearness: Floats


def _shorter_median(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2]  # of two the shorter: what is added by chance makes steps longer


class CostCurve:
    """Seconds by (size, requests, context tokens); `speed` multiplies all of it."""

    def __init__(self) -> None:
        self.speed = 1.0
        self.num_observed = 0
        self._num_absurd = 0  # one after the other
        self._places: OrderedDict[tuple[int, int, int], Place] = OrderedDict()
        self._recent: deque[tuple[Place, float]] = deque(maxlen=_SPEED_FROM)
        self._weights = np.zeros(0)
        self._fitted_at, self._fit_after = 0, 1
        self._by_size = np.zeros(0)  # what the terms of size say at each knot
        # Since the fit, by requests and place of context, and what was measured by place of requests.
        self._tables: dict[tuple[int, int], _Table] = {}
        self._measured: dict[int, _Measured | None] = {}

    @property
    def is_known(self) -> bool:
        """Whether there is anything to go by."""
        return self.num_observed > 0

    def _num_within(self, distance: int, size: int, requests: int) -> int:
        here, many = _size_place(size), _request_place(requests)
        near = (p for (at, n, _), p in self._places.items() if n == many and abs(at - here) <= distance)
        return sum(place.num for place in near)

    def observe(self, size: int, requests: int, context: int, seconds: float) -> None:
        """Learn from one step. A clock that stood still, went backwards or leapt ahead teaches nothing."""
        if not (math.isfinite(seconds) and seconds > 0):
            return
        key = (_size_place(size), _request_place(requests), _context_place(context))
        place = self._places.get(key)
        if self._is_absurd(seconds, size, requests, context, place):
            return
        if place is None:
            place = self._places[key] = Place(size, requests, context, self._expected(size, requests, context))
            if len(self._places) > _MOST_PLACES:
                self._places.popitem(last=False)
        self._places.move_to_end(key)
        value, num = seconds / self.speed, place.num
        expected = place.usual
        if self.num_observed - place.latest > _PAST:
            place.forget_all_but_last()
        if expected:
            self._recent.append((place, math.log(value / expected)))
        share = 1 / (1 + num)
        place.size += share * (size - place.size)
        place.requests += share * (requests - place.requests)
        place.context += share * (context - place.context)
        place.seconds.append(value)
        self.num_observed += 1
        place.latest = self.num_observed
        if self.num_observed % _SPEED_EVERY == 0:
            self._follow_speed()
        is_time_to_look = self.num_observed % _SPEED_FROM == 0
        if is_time_to_look and self._is_off():
            self._fit_after = min(self._fit_after, self._fitted_at + _FEWEST_BETWEEN_FITS)
        if self.num_observed >= self._fit_after or (is_time_to_look and self._is_elsewhere()):
            self.fit()
            self._fitted_at = self.num_observed
            self._fit_after = self.num_observed + min(_MOST_BETWEEN_FITS, max(1, self.num_observed // 4))

    def seconds(self, sizes: Floats | NDArray[np.int64], requests: int, context: int) -> Floats:
        """[n]  seconds of steps of these sizes [n]; all 1 while nothing is known."""
        if not len(self._weights):
            return np.ones(len(sizes))
        flat, per_context, _, _ = self._at_knots(requests, context)
        return np.maximum(np.interp(sizes, _KNOTS, flat + context * per_context) * self.speed, _LEAST_SECONDS)

    def seconds_of(self, size: int, requests: int, context: int) -> float:
        """The same for one step, without arrays: it is asked several times a step."""
        if not len(self._weights):
            return 1.0
        _, _, flat, per_context = self._at_knots(requests, context)
        right = min(max(1, bisect_left(_KNOT_LIST, size)), len(_KNOT_LIST) - 1)
        left = right - 1
        share = min(max(0.0, (size - _KNOT_LIST[left]) / (_KNOT_LIST[right] - _KNOT_LIST[left])), 1.0)
        below, above = flat[left] + context * per_context[left], flat[right] + context * per_context[right]
        return max((below + share * (above - below)) * self.speed, _LEAST_SECONDS)

    def fit(self) -> None:
        """Fit the terms to the medians of all places, in relative error."""
        self._tables.clear()
        self._measured.clear()
        places = list(self._places.values())
        at = np.array([(p.size, p.requests, p.context) for p in places])
        seconds = np.array([p.median for p in places])
        trust = np.array([p.num for p in places]) * self._freshness(places)
        typical = float(np.exp(np.log(seconds).mean()))
        x = _terms(at[:, 0], at[:, 1], at[:, 2]) * (typical / seconds)[:, None]
        weighted = x * trust[:, None]
        gram = weighted.T @ x + np.diag(_reluctance(x.shape[1]))
        start = self._weights / typical if len(self._weights) else np.zeros(len(gram))
        self._weights = nonnegative_least_squares(gram, weighted.sum(0), start) * typical
        self._by_size = self._weights[0] + _KNOTS / 32 * self._weights[1]
        self._by_size[1:] += np.cumsum(self._weights[_NUM_SMOOTH:])
        for place in places:
            place.is_fitted = True

    def as_json(self) -> dict[str, Any]:
        """What a capacity file keeps of it."""
        return {
            "places": [
                [p.size, p.requests, p.context, [round(s * self.speed, 9) for s in p.seconds]]
                for p in self._places.values()
            ]
        }

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> CostCurve:
        """The inverse of as_json; raises ValueError, TypeError or KeyError on anything else."""
        curve = cls()
        for size, requests, context, seconds in state["places"]:
            values = [float(s) for s in seconds]
            are_measured = all(0 < v < _LARGEST for v in (size, requests, *values)) and 0 <= context < _LARGEST
            if not values or not are_measured:
                raise ValueError(f"not a measured step: {size}, {requests}, {context}, {seconds}")
            key = (_size_place(size), _request_place(requests), _context_place(context))
            place = Place(float(size), float(requests), float(context), latest=-_PAST)
            place.seconds.extend(values)
            curve._places[key] = place
            curve.num_observed += len(values)
        if curve._places:
            curve.fit()
        return curve

    def _is_absurd(self, seconds: float, size: int, requests: int, context: int, place: Place | None) -> bool:
        if not self.is_known:
            return False
        if place is None:
            believed = self.seconds_of(size, requests, context)
        elif seconds > _ABSURD * min(place.seconds) * self.speed:  # hardly ever, and sooner said than the median
            believed = place.median * self.speed
        else:
            believed = seconds
        self._num_absurd = self._num_absurd + 1 if seconds > _ABSURD * believed else 0
        return 0 < self._num_absurd < _SO_OFTEN

    def _expected(self, size: int, requests: int, context: int) -> float:
        """Seconds at speed 1 that such a step took before, at other contexts; 0 where there was none like it."""
        if not len(self._weights) or self._num_within(_NEAR, size, requests) < _MEDIAN_OF // 2:
            return 0.0
        return self.seconds_of(size, requests, context) / self.speed

    def _freshness(self, places: Sequence[Place]) -> Floats:
        """Of what lies next to each other the newer counts more; alone, the oldest still does."""
        ages = self.num_observed - np.array([p.latest for p in places], dtype=float)
        return np.maximum(0.5 ** (ages / _HALF_AS_FRESH), _OLD)

    def _is_off(self) -> bool:
        """Whether half of the steps like the last ones take something else than is believed of them: one place is off by
        chance often enough, or because terms that never fall cannot follow it.
        """
        believed = (
            (p.median * self.speed, self.seconds_of(round(p.size), round(p.requests), round(p.context)))
            for p in self._latest()
            if p.is_fitted
        )
        are_off = [abs(math.log(median / seconds)) > _SPEED_CHANGE for median, seconds in believed]
        return 2 * sum(are_off) >= len(are_off) > 0

    def _is_elsewhere(self) -> bool:
        """Whether some of the last steps are of sizes that the last fit did not know."""
        return any(not p.is_fitted for p in self._latest())

    def _latest(self) -> list[Place]:
        places = islice(reversed(self._places.values()), _LATEST)
        return [place for place in places if place.num > _MEDIAN_OF // 2]

    def _follow_speed(self) -> None:
        """When most of the last steps took longer than the same steps before, all steps do."""
        if len(self._recent) <= _SPEED_FROM // 2:
            return
        ratios = sorted(ratio for _, ratio in self._recent)
        change = ratios[len(ratios) // 2]
        if abs(change) < _SPEED_CHANGE or ratios[len(ratios) // 4] * ratios[-1 - len(ratios) // 4] <= 0:
            return
        self.speed *= math.exp(change)
        # These were divided by the old speed; what is from before the change stays as it is.
        for place, ratio in self._recent:
            if len(place.seconds) > 1 and abs(ratio) > abs(change) / 2:
                place.seconds.pop()
        self._recent.clear()

    def _at_knots(self, requests: int, context: int) -> _Table:
        """What is believed at each knot; straight lines lie between them."""
        key = requests, _context_place(context)
        table = self._tables.get(key)
        if table is None:
            flat, per_context = self._table(*key)
            table = self._tables[key] = _Table(flat, per_context, flat.tolist(), per_context.tolist())
        return table

    def _table(self, requests: int, context_place: int) -> tuple[Floats, Floats]:
        w = self._weights
        flat = self._by_size + ((requests > 1) * w[2] + requests / 32 * w[3])
        per_context = (w[4] + w[5] * _KNOTS / requests) / 4096
        return self._corrected(flat, per_context, requests, context_place)

    def _corrected(self, flat: Floats, per_context: Floats, requests: int, context_place: int) -> tuple[Floats, Floats]:
        """Closer to what was measured with as many requests, where the terms do not tell all."""
        many = _request_place(requests)
        if many not in self._measured:
            self._measured[many] = self._measured_with(many)
        measured = self._measured[many]
        if measured is None:
            return flat, per_context
        trust = measured.num / (1 + 3 * (measured.context_places - context_place) ** 2)
        fresh = trust * measured.freshness
        num, weight, excess = np.array((trust, fresh, fresh * measured.excess)) @ measured.nearness
        factor = np.exp(excess / (weight + 1e-9) * num / (num + 1.0))
        return rising(flat * factor, weight + 1e-3), np.maximum.accumulate(per_context * factor)

    def _measured_with(self, many: int) -> _Measured | None:
        own = [(key[2], p) for key, p in self._places.items() if key[1] == many]
        if not own:
            return None
        context_places, places = zip(*own, strict=True)
        at = np.array([(p.size, p.requests, p.context) for p in places])
        believed = _terms(at[:, 0], at[:, 1], at[:, 2]) @ self._weights
        excess = np.log(np.array([p.median for p in places]) / np.maximum(believed, 1e-12))
        # Nearby sizes share, those that were seen lately before others; far from all of them the terms are left alone.
        distance = np.log2(_KNOTS / at[:, :1])
        return _Measured(
            np.array(context_places),
            np.array([p.num for p in places], dtype=float),
            self._freshness(places),
            excess,
            np.exp(-((distance / 0.25) ** 2)),
        )


def rising(values: Floats, weights: Floats) -> Floats:
    """The nearest values that never fall (pool adjacent violators, Ayer et al. 1955): where they do, weights decide."""
    if (values[1:] >= values[:-1]).all():
        return values
    pools: list[tuple[float, float, int]] = []  # value, weight, how many
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        num = 1
        while pools and pools[-1][0] > value:
            other, w, n = pools.pop()
            value, weight, num = (value * weight + other * w) / (weight + w), weight + w, num + n
        pools.append((value, weight, num))
    return np.repeat([value for value, _, _ in pools], [num for _, _, num in pools])


def nonnegative_least_squares(gram: Floats, moment: Floats, start: Floats) -> Floats:
    """argmin over w >= 0 of w·gram·w - 2 w·moment (Lawson and Hanson 1974); gram must be positive definite.

    start >= 0: the nearer it is, the sooner it is done; zeros are fine.
    """
    weights, is_free = start.copy(), start > 0
    enough = 1e-9 * (1 + np.abs(moment).max())
    for _ in range(3 * len(moment)):
        while is_free.any():
            trial = np.zeros_like(weights)
            trial[is_free] = np.linalg.solve(gram[np.ix_(is_free, is_free)], moment[is_free])
            bad = is_free & (trial <= 0)
            if not bad.any():
                weights = trial
                break
            # Go towards it as far as nothing becomes negative; what is zero then leaves.
            steps = np.full(len(weights), np.inf)
            steps[bad] = weights[bad] / (weights[bad] - trial[bad])
            weights = weights + steps.min() * (trial - weights)
            is_free &= (weights > 0) & (steps > steps.min())
            weights[~is_free] = 0.0
        gradient = moment - gram @ weights
        gradient[is_free] = -np.inf
        if gradient.max() <= enough:
            break
        is_free[gradient.argmax()] = True
    return weights


def _terms(sizes: Floats, requests: Floats, context: Floats) -> Floats:
    """[n, terms]: base, size, more than one request, requests, context, attended pairs, and the ramps."""
    x = np.ones((len(sizes), _NUM_SMOOTH + len(_GAPS)))
    x[:, 1], x[:, 2], x[:, 3] = sizes / 32, requests > 1, requests / 32
    x[:, 4], x[:, 5] = context / 4096, context * sizes / requests / 4096
    x[:, _NUM_SMOOTH:] = np.minimum(np.maximum((sizes[:, None] - _KNOTS[:-1]) / _GAPS, 0.0), 1.0)
    return x


def _reluctance(num_terms: int) -> Floats:
    """How little each term is to be used without need: straight lines before ramps, so that gaps are bridged by them."""
    reluctance = np.full(num_terms, 1e-1)
    reluctance[:_NUM_SMOOTH] = [1e-4, 1e-4, 1e-2, 1e-3, 1e-3, 1e-3]
    return reluctance


def _size_place(size: float) -> int:
    return round(size) if size <= 8 else 8 + round(4 * math.log2(size / 8))


def _request_place(requests: float) -> int:
    return round(2 * math.log2(max(requests, 1)))


def _context_place(context: float) -> int:
    return round(2 * math.log2(1 + context / 64))
