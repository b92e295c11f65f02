"""How many requests may be open at a time, and when those that are refused should come back."""

from __future__ import annotations

import math

from dspark.errors import QueueFull, ShuttingDown


class Admission:
    """Counts the requests that were taken and have not ended. Whoever uses it on several threads holds a lock.

    max_running, max_waiting  requests decoded together, and beyond them
    """

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self.max_running, self.max_waiting = max_running, max_waiting
        self.num_open, self.is_closed = 0, False
        self._seconds_each = 0.0  # smoothed: how long requests were here, shared among all who were

    def take(self, num_requests: int) -> None:
        """Let them in, all or none. Raises QueueFull and ShuttingDown."""
        if self.is_closed:
            raise ShuttingDown("the server is shutting down: no new request is taken")
        if self.num_open + num_requests > self.max_running + self.max_waiting:
            raise QueueFull(
                f"{self.num_open} requests are running or waiting, and {self.max_waiting} may wait: try again later",
                retry_seconds=max(1, min(60, math.ceil(self._seconds_each * self.max_waiting / 2))),
            )
        self.num_open += num_requests

    def end(self, arrival: float, now: float) -> None:
        """One of them has ended; it came at `arrival`.

        By Little's law one ends every (time spent here) / (number here) seconds, waits included and idle hours not, and
        when half of those who wait have gone, there is room for whoever comes back.
        """
        each = (now - arrival) / max(self.num_open, self.max_running)
        self._seconds_each += 0.1 * (each - self._seconds_each) if self._seconds_each else each
        self.num_open -= 1

    def close(self) -> None:
        """Take no more."""
        self.is_closed = True
