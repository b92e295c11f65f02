"""How much faster than plain decoding, measured while serving: what would these tokens have cost without drafts?

Plain steps are measured whenever there are some: when the guard turns drafting off, at the end of a request, and in
canary replays. Their seconds are kept by how many requests were decoded together.
"""

from __future__ import annotations

from dspark.monitor.recent import RecentRatio

_WEIGHT = 0.05  # of the newest plain step in the running mean of its size
_MEMORY_SECONDS = 60.0  # seconds of decoding after which a step weighs 1/e in `speedup`
_NEAR = 2.0  # a size is compared with plain steps of at most so many times, or parts of, as many requests
_FIRST = 3  # plain steps of a size before it is believed


class PlainReference:
    """Seconds of a plain step by number of requests, and the speed-up of the steps with drafts against it."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._counts: dict[int, int] = {}
        self._recent = RecentRatio(_MEMORY_SECONDS)

    def observe(self, num_requests: int, seconds: float) -> None:
        """A step without drafts and without prompt tokens took so long."""
        known = self._seconds.get(num_requests, seconds)
        self._counts[num_requests] = count = self._counts.get(num_requests, 0) + 1
        self._seconds[num_requests] = known + max(_WEIGHT, 1 / count) * (seconds - known)

    def step_seconds(self, num_requests: int) -> float | None:
        """A plain step of so many requests: straight between the nearest sizes measured; None where none is near."""
        sizes = sorted(n for n, count in self._counts.items() if count >= _FIRST)
        below = max((n for n in sizes if n <= num_requests), default=None)
        above = min((n for n in sizes if n >= num_requests), default=None)
        if below is not None and above is not None and below != above:
            share = (num_requests - below) / (above - below)
            return self._seconds[below] * (1 - share) + self._seconds[above] * share
        nearest = below if below is not None else above
        if nearest is None or max(nearest, num_requests) > _NEAR * min(nearest, num_requests):
            return None
        return self._seconds[nearest]

    def count(self, num_requests: int, num_tokens: int, seconds: float) -> float | None:
        """A step with drafts committed num_tokens for num_requests: what plain decoding takes for them, if known."""
        step = self.step_seconds(num_requests)
        if step is None:
            return None
        plain = step * num_tokens / num_requests
        self._recent.add(plain, seconds)
        return plain

    @property
    def speedup(self) -> float:
        return self._recent.value
