"""How well beliefs have held lately: stated confidence against outcomes, by position."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dspark.budget.online_logistic import Array

_NUM_BINS = 10


class RunningError:
    """Fading counts of judged draft tokens by position and stated confidence; memory in tokens of a position."""

    def __init__(self, num_positions: int, memory: float = 2000.0) -> None:
        self.memory = memory
        self.counts, self.stated, self.happened = np.zeros((3, num_positions, _NUM_BINS))

    def add(self, place: NDArray[np.int64], stated: Array, happened: Array) -> None:
        """Judged tokens [N]: position from 0, what was believed, what happened."""
        shape = self.counts.shape
        cells = place * _NUM_BINS + np.minimum((stated * _NUM_BINS).astype(int), _NUM_BINS - 1)
        new = [np.bincount(cells, v, self.counts.size).reshape(shape) for v in (np.ones(len(cells)), stated, happened)]
        kept = np.exp(-new[0].sum(1, keepdims=True) / self.memory)
        for total, values in zip((self.counts, self.stated, self.happened), new, strict=True):
            total *= kept
            total += values

    @property
    def num_tokens(self) -> list[float]:
        """Judged tokens of each position, faded."""
        return [round(n, 1) for n in self.counts.sum(1).tolist()]

    @property
    def errors(self) -> list[float]:
        """Calibration error of each position; 0 where nothing was judged."""
        gaps = np.abs(self.stated - self.happened).sum(1)
        return (gaps / np.maximum(self.counts.sum(1), 1e-9)).tolist()

    @property
    def biases(self) -> list[float]:
        """Mean of stated minus observed at each position: above 0 is overconfident."""
        gaps = (self.stated - self.happened).sum(1)
        return (gaps / np.maximum(self.counts.sum(1), 1e-9)).tolist()
