"""What drafting costs besides drafts: the drafter reads prompts as well, and whatever came while it was not asked.

Steps in which it does are no usual ones and are compared with nothing, so their extra seconds are counted here. There is
something to pay however little is read, so what a few positions took says little of what a prompt takes.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence

from dspark.budget.capacity import Capacity
from dspark.types import StepRecord

_MOST_UNREAD = 16  # positions per request; the seconds of reading fewer are among those of usual drafts
_MEDIAN_OF = 12
_FAR = 1.25  # times as many positions: less says nothing of what one more takes
_MEMORY = 4096.0  # committed tokens after which a prompt counts half
_PRIOR = 2048.0  # committed tokens, without prompts, to begin with: prompts come first, what they bring later
_ABSURD = 30.0  # times as long as a whole draft, for one position: a clock that leapt


class ReadingUp:
    """Seconds of the drafter for what it has not read, and how much of that comes with each token."""

    def __init__(self) -> None:
        self._readings: deque[tuple[int, float]] = deque(maxlen=_MEDIAN_OF)  # positions, and their seconds
        self._law: tuple[float, float] | None = None  # seconds for reading at all, and for each position
        self._prompts, self._prompt_tokens, self._committed = 0.0, 0.0, _PRIOR
        self._ids: list[int] = []  # of requests that decoded last

    def observe(self, record: StepRecord, capacity: Capacity) -> None:
        """Learn from a step what reading took, if there was much to read, and how long prompts are."""
        committed = len(record.request_ids) + sum(record.accepted)
        fade = 0.5 ** (committed / _MEMORY)
        # What a prefix cache spares the target the drafter reads all the same.
        self._prompt_tokens = self._prompt_tokens * fade + record.num_prompt_tokens + record.num_prefix_found
        self._prompts *= fade
        self._committed = self._committed * fade + committed
        if record.request_ids and record.request_ids != self._ids:
            self._prompts += len({*record.request_ids} - {*self._ids})
            self._ids = record.request_ids
        if record.load is None or record.num_unread <= _MOST_UNREAD * max(1, record.num_asked):
            return
        usual = capacity.draft_seconds(record.num_asked, record.load.context_tokens)
        extra = record.draft_seconds - usual
        if usual and math.isfinite(extra) and extra < _ABSURD * usual * record.num_unread:
            self._readings.append((record.num_unread, max(0.0, extra)))
            self._law = None

    def seconds(self, num_positions: float, num_times: float = 1.0) -> float:
        """Of the drafter, for reading so many positions, so many times some of them; 0 while that is not known."""
        if not self._readings:
            return 0.0
        if self._law is None:
            self._law = _line_through(self._readings)
        once, per_position = self._law
        return num_times * once + num_positions * per_position

    @property
    def seconds_per_token(self) -> float:
        """Of the drafter, for the prompts that come with each committed token, where it drafts for all."""
        return self.seconds(self._prompt_tokens / self._committed, self._prompts / self._committed)

    @property
    def tokens_per_prompt(self) -> float:
        """Committed tokens that come with each prompt."""
        return self._committed / max(1.0, self._prompts)


def _line_through(readings: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Medians of slopes and of what they leave (Theil 1950, Sen 1968); neither below 0."""
    slopes = [(t - s) / (n - m) for m, s in readings for n, t in readings if n > _FAR * m]
    rate = statistics.median(s / m for m, s in readings)
    slope = min(rate, max(0.0, statistics.median(slopes))) if slopes else rate
    return max(0.0, statistics.median(s - slope * m for m, s in readings)), slope
