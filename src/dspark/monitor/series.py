"""Counters, gauges and histograms that cost next to nothing to add to: every step of the engine adds to some seventy.

Those of prometheus-client take a lock and look at what they are given each time, which made up most of what watching
costs. Of these only one thread may add to each; others read, and may see a number of a moment ago. On the page they look
the same.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Generic, Protocol, TypeVar

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.utils import floatToGoString


class _Series(Protocol):
    def shown(self) -> dict[str, Any]:
        """What its family's `add_metric` is told of it."""
        ...


T = TypeVar("T", bound=_Series)


class Family(Generic[T]):
    """All series of one name, made by `make` when their labels are first asked for; `kind` is how the page shows them."""

    def __init__(self, make: Callable[[], T], kind: Any, name: str, text: str, labels: Sequence[str] = ()) -> None:
        self._make, self._kind, self._named = make, kind, (name, text)
        self._labels, self._series = labels, dict[tuple[str, ...], T]()

    def labels(self, *values: str) -> T:
        """The series whose labels have these values."""
        if values not in self._series:
            self._series[values] = self._make()
        return self._series[values]

    def collect(self) -> Iterator[Any]:
        """What a registry asks when somebody reads it."""
        family = self._kind(*self._named, labels=self._labels)
        for values, series in self._series.items():
            family.add_metric(values, **series.shown())
        yield family


class Counter:
    """Only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1.0) -> None:
        self.value += amount

    def shown(self) -> dict[str, Any]:
        return {"value": self.value}


class Gauge:
    """Set to a number, or to a function that says it whenever it is asked for."""

    __slots__ = ("_function", "_value")

    def __init__(self) -> None:
        self._value = 0.0
        self._function: Callable[[], float] | None = None

    def set(self, value: float) -> None:
        self._value = value

    def set_function(self, function: Callable[[], float]) -> None:
        self._function = function

    def shown(self) -> dict[str, Any]:
        return {"value": self._value if self._function is None else self._function()}


class Histogram:
    """Observations by upper bounds, in rising order."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def shown(self) -> dict[str, Any]:
        edges = [*map(floatToGoString, self._bounds), "+Inf"]
        return {"buckets": list(zip(edges, accumulate(self._counts), strict=True)), "sum_value": self._sum}


class Registry(CollectorRegistry):
    """Where series are made and read."""

    def counters(self, name: str, text: str, *labels: str) -> Family[Counter]:
        return self._registered(Family(Counter, CounterMetricFamily, name, text, labels))

    def counter(self, name: str, text: str) -> Counter:
        return self.counters(name, text).labels()

    def gauges(self, name: str, text: str, *labels: str) -> Family[Gauge]:
        return self._registered(Family(Gauge, GaugeMetricFamily, name, text, labels))

    def gauge(self, name: str, text: str) -> Gauge:
        return self.gauges(name, text).labels()

    def histogram(self, name: str, text: str, bounds: Sequence[float]) -> Histogram:
        return self._registered(Family(lambda: Histogram(bounds), HistogramMetricFamily, name, text)).labels()

    def _registered(self, family: Family[T]) -> Family[T]:
        self.register(family)  # which asks for nothing but `collect`
        return family
