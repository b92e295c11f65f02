"""What drafting for a text is worth as it grows: its beginning may pay where what follows does not, or the other way round."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

from dspark.budget.fares import Fares, Stage

_SURELY = 1.06  # times as many tokens per second that drafts are expected to give later


@dataclass(frozen=True)
class Outlook:
    """
    advantage  tokens per second over plain decoding, at the stage that is asked about
    fares      what drafts give at others, in what they give there
    length     tokens that such texts usually have
    """

    advantage: float
    fares: Fares
    length: float

    def steps_saved(self, stages: Sequence[Stage], by_drafting: bool) -> float:
        """Plain steps, until the texts have an age at which the other way is better."""
        saved = 0.0
        for stage in stages:
            for _, advantage, num_tokens in self._as_it_grows(stage):
                gain = 1 - 1 / advantage if by_drafting else 1 / advantage - 1
                if gain <= 0:
                    break
                saved += gain * num_tokens / len(stages)
        return saved

    def while_it_pays(self, stage: Stage) -> list[Stage]:
        """This stage, and those after it at which a text that is drafted for now is surely still worth it."""
        older = takewhile(lambda step: step[1] > _SURELY, islice(self._as_it_grows(stage), 1, None))
        return [stage, *(stage for stage, _, _ in older)]

    def pays_from(self, stage: Stage, least: float) -> int:
        """Tokens of a text at this stage, which is not drafted for, from which on drafts may give so many times as much."""
        begins = stage.older.begins
        for older, advantage, num_tokens in islice(self._as_it_grows(stage), 1, None):
            begins = older.begins
            if advantage >= least:
                break
            begins += num_tokens
        return begins

    def _as_it_grows(self, stage: Stage) -> Iterator[tuple[Stage, float, int]]:
        """Stages of a text from this one on, as far as such texts go: the advantage of drafting there, by how others fare,
        and how many tokens it has at each.
        """
        ends = max(round(self.length), 2 * stage.begins)
        here = 1 + self.fares.expected(stage)
        while stage.begins < ends:
            advantage = self.advantage * (1 + self.fares.expected(stage)) / here
            yield stage, advantage, min(stage.older.begins, ends) - stage.begins
            stage = stage.older
