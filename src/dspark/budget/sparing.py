"""A scheduler that is asked as often as its answers are worth the time that they take.

To believe something of each draft token, to choose among them and to learn what came of it takes some tenths of a
millisecond of the host. Where a step takes twenty, that is nothing; where it takes two, it is more than the choice saves.
Then most steps verify as many tokens of each draft as would have been best lately, as with a fixed length.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import accumulate, chain, compress

from torch import Tensor

from dspark.budget.prefix_scheduler import FixedLength
from dspark.budget.throughput import StepCost, seconds_of_step
from dspark.types import Draft, Load, PrefixScheduler, StepRecord

_SHARE = 0.02  # of the seconds of steps, to be spent on choosing where that saves less than it takes
_RAREST = 16  # steps
_LATELY = 16  # steps
_SAMPLED = 4  # spared steps, of which one is timed
_FIRST = 8  # choices that are weighed before any is spared
_WEIGHED = 4  # choices, of which one is compared with fixed lengths, where all are made


class Sparing:
    """`scheduler` where it is worth asking, and else the fixed length that would have been best beside its choices.

    cost  seconds of steps, by which choices and lengths are compared
    """

    def __init__(self, scheduler: PrefixScheduler, cost: StepCost) -> None:
        self.scheduler, self.cost = scheduler, cost
        self.anticipates = scheduler.anticipates
        self._beside: list[float] = []  # tokens per second of lengths 0, 1, …, in those of the choices made, on average
        self._num_choices = self._num_weighed = 0
        self._spacing = self._since = 1  # steps from one choice to the next, and since the last one
        self._asked: deque[tuple[float, float]] = deque(maxlen=_LATELY)  # seconds of the host, and of the step
        self._spared: deque[tuple[float, float]] = deque(maxlen=_LATELY)

    def can_spare(self, draft: Draft) -> bool:
        """Whether this step does without a choice, so that nothing need be believed of the draft.

        Every so many steps, whoever is in them: what is learned of first drafts only would be true of no others.
        """
        self._since += 1
        if self._since < self._spacing and draft.parents is None:
            return True
        self._since = 0
        return False

    def choose(self, draft: Draft, survival: Tensor, load: Load) -> Tensor:
        """As the scheduler does; of a draft of which nothing is believed, the usual length."""
        if survival.shape != draft.tokens.shape:
            return FixedLength(self._beside.index(max(self._beside))).choose(draft, survival, load)
        keep = self.scheduler.choose(draft, survival, load)
        self._num_choices += 1
        is_few = self._spacing > 1 or self._num_weighed < _FIRST
        if draft.parents is None and (is_few or self._num_choices % _WEIGHED == 0):
            self._weigh(survival, keep, load)
        return keep

    def _weigh(self, survival: Tensor, keep: Tensor, load: Load) -> None:
        """Compare a choice with what fixed lengths would have been expected to give."""
        rows, kept = survival.tolist(), keep.tolist()
        seconds = seconds_of_step(self.cost, load, sum(map(len, rows))).tolist()
        chosen = sum(compress(chain(*rows), chain(*kept)))
        rate = (len(rows) + chosen) / seconds[sum(map(sum, kept))]
        columns = list(zip(*rows, strict=True))
        tokens = accumulate(map(sum, columns), initial=len(rows))
        counts = accumulate((sum(chance > 0 for chance in column) for column in columns), initial=0)
        beside = [number / seconds[count] / rate for number, count in zip(tokens, counts, strict=True)]
        self._num_weighed += 1
        share = 1 / min(self._num_weighed, _LATELY)
        # A shorter draft has nothing beyond its end, a longer one than ever starts from what the longest were worth.
        beside += beside[-1:] * (len(self._beside) - len(beside))
        before = self._beside + (self._beside[-1:] or [0.0]) * (len(beside) - len(self._beside))
        self._beside = [old + share * (new - old) for old, new in zip(before, beside, strict=True)]

    def observe(self, record: StepRecord) -> None:
        """Learn what choosing takes, believing and learning included."""
        is_spared = record.survival is None
        if record.num_prompt_tokens or not any(record.drafted) or (is_spared and self._since % _SAMPLED):
            return
        seconds = record.seconds
        took = seconds.get("schedule", 0.0) + seconds.get("learn", 0.0), sum(seconds.values())
        if is_spared:
            self._spared.append(took)
            return
        self._asked.append(took)
        if self._num_weighed < _FIRST or len(self._asked) < _FIRST:
            return
        asked, step = _usual(self._asked)
        spared, _ = _usual(self._spared) if self._spared else (0.0, 0.0)
        price = (asked - spared) / max(step - asked, 1e-9)
        gain = 1 / max(self._beside) - 1
        self._spacing = 1 if gain >= price else min(_RAREST, math.ceil(price / _SHARE))


def _usual(took: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Means without the largest, which may have met with anything; learning takes long in some steps and nothing in others."""
    host, whole = (sorted(column)[: max(1, len(took) - 1)] for column in zip(*took, strict=True))
    return sum(host) / len(host), sum(whole) / len(whole)
