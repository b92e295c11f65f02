"""What a step with drafts is believed to give, before they are made: as past drafts have promised, at what steps cost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from dspark.budget.capacity import Capacity
from dspark.budget.side_by_side import SideBySide
from dspark.budget.throughput import seconds_of_step
from dspark.types import Load


class Prospects:
    """Tokens and seconds to expect of one load's next step, for any choice of requests to draft for.

    samples      n times B rows  survival that drafts for each request may promise
    weights      (n)             how likely each sample is
    share_found  of drafts asked for, those that have a token

    Lists, because requests are few and samples too, which arrays would take longer over.
    """

    def __init__(
        self,
        capacity: Capacity,
        side_by_side: SideBySide,
        load: Load,
        samples: Sequence[Sequence[Sequence[float]]],
        weights: Sequence[float],
        share_found: float,
    ) -> None:
        self._capacity, self._side_by_side, self._load = capacity, side_by_side, load
        self._samples, self._weights, self._share_found = samples, weights, share_found
        self._num_decoding = len(samples[0])
        promised = [sum(map(sum, rows)) for rows in zip(*samples, strict=True)]
        self.promising = sorted(range(self._num_decoding), key=promised.__getitem__, reverse=True)
        width = max(len(row) for row in chain.from_iterable(samples))
        self._costs: list[float] = seconds_of_step(capacity, load, self._num_decoding * width).tolist()
        self._known: dict[tuple[int, ...], tuple[float, float]] = {}
        self.plain_rate = self._num_decoding / self._costs[0]

    def of(self, rows: Sequence[int]) -> tuple[float, float]:
        """Tokens and seconds of a step that drafts for these requests and verifies what has the highest rate."""
        key = tuple(rows)
        if key not in self._known:
            self._known[key] = self._expected(key)
        return self._known[key]

    def _expected(self, rows: Sequence[int]) -> tuple[float, float]:
        share = len(rows) / self._num_decoding
        drafting = self._capacity.draft_seconds(len(rows), round(self._load.context_tokens * share))
        tokens, seconds = (1 - self._share_found) * self._num_decoding, (1 - self._share_found) * self._costs[0]
        for sample, weight in zip(self._samples, self._weights, strict=True):
            best, cost = self._best_of(sorted(chain.from_iterable(sample[b] for b in rows), reverse=True), drafting)
            tokens, seconds = tokens + self._share_found * weight * best, seconds + self._share_found * weight * cost
        seconds += (1 - self._share_found) * drafting
        return tokens, seconds * self._side_by_side.excess(self._capacity, self._load, len(rows))

    def _best_of(self, chances: Sequence[float], drafting: float) -> tuple[float, float]:
        """Tokens and seconds where as many of these draft tokens are verified as gives the most tokens per second."""
        committed = best = float(self._num_decoding)
        best_cost = self._costs[0] + drafting
        for chance, cost in zip(chances, self._costs[1:], strict=False):
            committed += chance
            if committed * best_cost > best * (cost + drafting):
                best, best_cost = committed, cost + drafting
        return best, best_cost
