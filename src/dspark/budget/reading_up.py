"""What drafting costs besides drafts: the drafter reads prompts as well, and whatever came while it was not asked.

Steps in which it does are no usual ones and are compared with nothing, so their extra seconds are counted here.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

from dspark.budget.capacity import Capacity
from dspark.types import StepRecord

_MOST_UNREAD = 16  # positions per request; the seconds of reading fewer are among those of usual drafts
_MEDIAN_OF = 9
_MEMORY = 4096.0  # committed tokens after which a prompt counts half
_PRIOR = 2048.0  # committed tokens, without prompts, to begin with: prompts come first, what they bring later
_ABSURD = 30.0  # times as long as a whole draft, for one position: a clock that leapt


class ReadingUp:
    """Seconds of the drafter for each position that it has not read, and how many of them come with each token."""

    def __init__(self) -> None:
        self._per_position: deque[float] = deque(maxlen=_MEDIAN_OF)
        self._prompt_tokens, self._committed = 0.0, _PRIOR

    def observe(self, record: StepRecord, capacity: Capacity) -> None:
        """Learn from a step what reading took, if there was much to read, and how long prompts are."""
        committed = len(record.request_ids) + sum(record.accepted)
        fade = 0.5 ** (committed / _MEMORY)
        # What a prefix cache spares the target the drafter reads all the same.
        self._prompt_tokens = self._prompt_tokens * fade + record.num_prompt_tokens + record.num_prefix_found
        self._committed = self._committed * fade + committed
        if record.load is None or record.num_unread <= _MOST_UNREAD * max(1, record.num_asked):
            return
        usual = capacity.draft_seconds(record.num_asked, record.load.context_tokens)
        extra = (record.draft_seconds - usual) / record.num_unread
        if usual and math.isfinite(extra) and extra < _ABSURD * usual:
            self._per_position.append(max(0.0, extra))

    def seconds(self, num_positions: float) -> float:
        """Of the drafter, for reading so many positions; 0 while that is not known."""
        return num_positions * statistics.median(self._per_position) if self._per_position else 0.0

    @property
    def seconds_per_token(self) -> float:
        """Of the drafter, for the prompts that come with each committed token, where it drafts for all."""
        return self.seconds(self._prompt_tokens / self._committed)
