"""Do drafters mean what they say? Stated confidence against what was accepted, in ten bins."""

from __future__ import annotations

import math
from collections.abc import Iterable

NUM_BINS = 10
_MEMORY = 20_000  # judged draft tokens after which an observation weighs 1/e in `error`


class Reliability:
    """Counts judged draft tokens by stated confidence; `error` is the expected calibration error of recent ones.

    Only tokens that were reached may be added (judged.py).
    """

    def __init__(self, num_bins: int = NUM_BINS) -> None:
        self.labels = [f"{(b + 1) / num_bins:g}" for b in range(num_bins)]  # upper edges
        self.tokens = [0.0] * num_bins  # recent ones, older ones faded
        self.accepted = [0.0] * num_bins
        self.confidence = [0.0] * num_bins

    def add(self, judged: Iterable[tuple[bool, float]]) -> Iterable[tuple[int, tuple[int, int, float]]]:
        """Of judged draft tokens (accepted?, stated confidence): (bin, (tokens, accepted, sum of confidences)) of each bin."""
        found: dict[int, tuple[int, int, float]] = {}
        for is_right, confidence in judged:
            b = min(int(confidence * len(self.labels)), len(self.labels) - 1)
            tokens, right, total = found.get(b, (0, 0, 0.0))
            found[b] = (tokens + 1, right + is_right, total + confidence)
        self._fade(sum(tokens for tokens, _, _ in found.values()))
        for b, (tokens, right, total) in found.items():
            self.tokens[b] += tokens
            self.accepted[b] += right
            self.confidence[b] += total
        return found.items()

    def _fade(self, num_new: int) -> None:
        factor = math.exp(-num_new / _MEMORY)
        for values in (self.tokens, self.accepted, self.confidence):
            values[:] = [v * factor for v in values]

    @property
    def error(self) -> float:
        """Mean distance between stated confidence and accepted share, bins weighed by tokens; NaN without any."""
        judged = sum(self.tokens)
        if not judged:
            return math.nan
        return sum(abs(a - c) for a, c in zip(self.accepted, self.confidence, strict=True)) / judged
