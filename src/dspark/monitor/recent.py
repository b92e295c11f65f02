"""A ratio of two sums in which old observations fade: what gauges show between the first observation and for ever."""

from __future__ import annotations

import math


class RecentRatio:
    """numerator / denominator over about the last `memory` of the denominator; NaN while there is nothing."""

    def __init__(self, memory: float) -> None:
        self._memory = memory
        self._numerator = self._denominator = 0.0

    def add(self, numerator: float, denominator: float) -> None:
        """What came last; what came before counts the less, the larger the denominator."""
        fade = math.exp(-denominator / self._memory)
        self._numerator = self._numerator * fade + numerator
        self._denominator = self._denominator * fade + denominator

    @property
    def value(self) -> float:
        """The ratio; not a number before anything came."""
        return self._numerator / self._denominator if self._denominator > 0 else math.nan
