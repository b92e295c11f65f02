"""Never slower than plain decoding: which requests are worth drafting for at all.

Drafting is paid for before it is known what it is worth, so the guard goes by how the last drafts of each request, and
of all, were believed to fare, by what was accepted of them, and by what steps and drafts cost. The paper leaves this
open ("the draft is always paid for", section 6).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dspark.budget.capacity import Capacity
from dspark.budget.fares import Fares
from dspark.budget.reading_up import ReadingUp
from dspark.budget.side_by_side import SideBySide
from dspark.budget.throughput import seconds_of_step
from dspark.types import Load, StepRecord

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class GuardSettings:
    """
    min_observations  drafts whose outcome is known before the drafter is judged
    start_above       start again when drafting is believed to give more than this share of plain tokens per second; it stops
                      below 1
    probe_share       of all seconds about so much is lost by drafts that only serve to learn, and by plain steps that do
    num_remembered    drafts of each request that are remembered
    half_life         drafts after which one counts half
    memory            steps after which a draft says no more of its request than others say
    reconsider_every  drafted steps between decisions while there are about as many requests, up to four times as many
                      where drafts have clearly paid for a while; there, requests that come and go do not matter either.
                      Off, it is decided once for each mix of requests and before each probe, which teaches something
    """

    min_observations: int = 24
    start_above: float = 1.04
    probe_share: float = 0.003
    num_remembered: int = 24
    half_life: float = 8.0
    memory: int = 200
    reconsider_every: int = 8


# Steps that are learned from at a time: between two the processor's caches forget how it is done.
_TOGETHER, _TOGETHER_OFF = 8, 64
_AT_ENDS = 12
_MOST_MIXES = 64
_HOLDS = 512  # steps at most that it is not decided anew whether to start
_NOBODY: frozenset[int] = frozenset()
_ENOUGH = 8  # pairs of a plain and a drafted step before the comparison is believed: of few, most may be disturbed
_FEW, _BEYOND_DOUBT = 3, 2.0  # which does not matter where drafts give so many times as many tokens per second
_SOON = 4  # drafted steps before a plain one until then
_SOONEST = 12  # and afterwards, where it loses nothing
_SELDOM_FOUND = 4  # times as many steps without a draft tell as much
_TELLING, _FEW_TELLING = 16, 4  # drafts that are worth a decision, and that may undo the last one
_CLEARLY = 1.15  # times as many tokens per second,
_CLEAR = 2  # as often as this, one decision after the other
_CHEAP = 0.06  # of a step
_LOOK = 6  # drafts until it is known that a text is no easier than others
_UNREST = 2.0  # plain steps that this costs besides
_SINGLE = 2  # requests
_LONGEST_LOOKED_FOR = 64  # tokens of a text to count on, which may have more


class _Refusal(NamedTuple):
    """What was decided for a mix of requests that are not drafted for: it holds until a step, and says how to probe."""

    until: int
    spacing: float  # steps between probes that what they are believed to lose allows
    probes_all: bool
    tries_new: bool  # texts that nobody has drafted for yet may be so much easier that a few drafts for them pay


class _Seen(NamedTuple):
    """A step to learn from, the requests that were drafted for, and their kinds."""

    now: int
    record: StepRecord
    asked: frozenset[int]
    kinds: dict[int, Hashable]


class Guard:
    """Says which requests are drafted for: `choose` before drafting, `observe` after the step."""

    def __init__(self, capacity: Capacity, settings: GuardSettings | None = None) -> None:
        self.capacity, self.settings = capacity, settings or GuardSettings()
        self.is_drafting = True
        self.reason: str | None = None  # why `choose` left requests out
        self.fares = Fares(self.settings.num_remembered, self.settings.memory)
        self._kinds: dict[int, Hashable] = {}
        self._asked = _NOBODY  # drafted for in this step
        self._waiting: list[_Seen] = []
        self._num_judged = 0
        self._share = 1.0  # of the drafts asked for that have a token, as believed when it was last decided
        self.side_by_side, self.reading_up = SideBySide(), ReadingUp()
        self._advantage = 1.0  # tokens per second over plain decoding, as believed when it was last decided
        self._num_clear = 0  # decisions, one after the other, to draft because it clearly pays
        self._length = 1.0  # seconds of a step with drafts, in those of a plain one
        self._probe_spacing = 0.0  # steps between probes that what they are believed to lose allows
        self._probes_all = True
        self._probed: set[int] = set()
        self._tried: set[int] = set()
        self._refused: dict[Hashable, _Refusal] = {}  # since the last probe, by what is known of requests
        self._resting: Sequence[int] = ()  # requests of which nobody is drafted for
        self._rests_until = 0.0  # before this step
        self._chosen: set[int] | None = None  # None: all
        self._num_chosen = 1
        self._decided_for: int | None = None  # about so many requests
        self._decided_about: set[int] = set()
        self._decided_kinds: set[Hashable] = set()
        self._decided_to_read = 0
        self._decided_at = self._now = 0
        self._num_told, self._decide_after = 0, 0  # steps with drafts since then, and after how many to decide again
        self._last_plain = self._last_probe = 0
        self._measured = -1  # when plain steps were last taken to be timed

    def choose(self, request_ids: Sequence[int], load: Load, kinds: Sequence[Hashable] = ()) -> list[int]:
        """Places in request_ids to draft for; `reason` says why others are not, if any.

        kinds  of the requests, where something is known of them: those of one kind are expected to fare alike
        """
        self._now += 1
        if not self.is_drafting and self._rests(request_ids, load, kinds):
            self.reason = "cost"
            return []
        self._kinds = dict(zip(request_ids, kinds, strict=False))
        rows = self._rows(request_ids, load)
        self._asked = frozenset(request_ids[b] for b in rows)
        return rows

    def _rests(self, request_ids: Sequence[int], load: Load, kinds: Sequence[Hashable]) -> bool:
        """Whether what was decided for such requests, not to draft for them, still holds: so it does in most steps where
        drafts do not pay, and most are about the same requests as the one before.
        """
        if self._now == self._last_probe + 1:
            return False
        if request_ids != self._resting:
            refusal = self._refused.get(self._mix(request_ids, load, kinds))
            if refusal is None or (refusal.tries_new and self._new_among(request_ids)):
                return False
            self._resting, self._rests_until = request_ids, self._end_of(refusal)
        return self._now < self._rests_until

    def _end_of(self, refusal: _Refusal) -> float:
        """The step before which nobody is drafted for: then comes a probe, or it is decided anew."""
        return min(refusal.until, self._last_probe + refusal.spacing)

    def _rows(self, request_ids: Sequence[int], load: Load) -> list[int]:
        everyone, self.reason = list(range(len(request_ids))), None
        if not everyone or self._num_judged < self.settings.min_observations:
            return everyone
        if self.is_drafting and self._needs_plain_step(load):
            self.reason = "measuring a plain step"
            return []
        if not self.is_drafting and self._now == self._last_probe + 1:  # decide again with what the probe shows
            self.reason = "cost"
            self._forget_refusals()
            return self._probes(request_ids, everyone)
        is_held = not self.is_drafting and self._now < self._decided_at + _HOLDS
        if is_held and _about(len(request_ids)) < _about(load.num_requests):
            # While others read their prompts, drafts for so few may pay; but the others decode in the next step.
            self.reason = "cost"
            return []
        mix = None if self.is_drafting else self._mix(request_ids, load, self._kinds.values())
        if self._is_due(request_ids, load, mix):
            mix = mix or self._mix(request_ids, load, self._kinds.values())
            self._reconsider(request_ids, load, mix)
        if not self.is_drafting:
            return self._rest(request_ids, mix)
        if self._chosen is None:
            return everyone
        rows = [b for b, i in enumerate(request_ids) if i in self._chosen or i not in self.fares]
        if len(rows) < len(everyone):
            self.reason = "difficulty"
            rows += self._probes(request_ids, [b for b in everyone if b not in set(rows)])
        return sorted(rows)

    def _mix(self, request_ids: Sequence[int], load: Load, kinds: Iterable[Hashable]) -> Hashable:
        """What a refusal is true of: every mix that is told from others is one more chance to be wrong about."""
        are_known = 2 * self.fares.num_known(request_ids) >= len(request_ids)
        return (
            _about(load.num_requests),
            frozenset(kinds),
            None if are_known else _to_read(load),
        )

    def _reconsider(self, request_ids: Sequence[int], load: Load, mix: Hashable) -> None:
        if self._decided_for != _about(load.num_requests):
            self._num_clear = 0
        self._decided_for, self._decided_about = _about(load.num_requests), set(request_ids)
        self._decided_kinds, self._decided_to_read = set(self._kinds.values()), _to_read(load)
        self._decide(request_ids, _without_prompts(load))  # the next step may have none
        if self.is_drafting:
            self._forget_refusals()
            return
        tries_new = self._may_be_easy(len(request_ids))
        self._refused[mix] = _Refusal(self._now + _HOLDS, self._probe_spacing, self._probes_all, tries_new)
        if len(self._refused) > _MOST_MIXES:
            del self._refused[next(iter(self._refused))]

    def _rest(self, request_ids: Sequence[int], mix: Hashable) -> list[int]:
        """Draft for nobody, or for a probe."""
        self.reason = "cost"
        refusal = self._refused[mix]
        self._probe_spacing, self._probes_all = refusal.spacing, refusal.probes_all
        rows = self._probes(request_ids, list(range(len(request_ids))))
        if not rows and refusal.tries_new:
            rows = self._new_among(request_ids)
            if rows:
                self._last_probe, self._probed = self._now, {request_ids[b] for b in rows}
            self._tried = {*request_ids}
        self._resting, self._rests_until = () if rows else request_ids, self._end_of(refusal)
        return rows

    def _new_among(self, request_ids: Sequence[int]) -> list[int]:
        """Places of requests that were never drafted for, if they are half of all or more, and all are few: what single
        texts are like says little of many.
        """
        if len(request_ids) > _SINGLE:
            return []
        new = [b for b, i in enumerate(request_ids) if i not in self.fares and i not in self._tried]
        return new if 2 * len(new) >= len(request_ids) else []

    def _may_be_easy(self, num_requests: int) -> bool:
        """Whether drafting a little for texts of which nothing is known is believed to pay, by how unlike others have been."""
        advantage = self._advantage * (1 + (self.fares.ease([*self._kinds.values()]) - 1) / math.sqrt(num_requests))
        length = min(self.reading_up.tokens_per_prompt, _LONGEST_LOOKED_FOR)
        gain = length * float(np.maximum(advantage - 1, 0).mean())
        return gain > _LOOK * self._length * float(np.maximum(1 - advantage, 0).mean()) + _UNREST

    def _forget_refusals(self) -> None:
        self._refused.clear()
        self._resting = ()

    def observe(self, record: StepRecord) -> None:
        """Learn how drafts fare, and what they cost beside plain steps."""
        self._waiting.append(_Seen(self._now, record, self._asked, self._kinds))
        self._num_judged += len(self._asked)
        self._num_told += bool(self._asked) and any(record.drafted)
        if not self._asked and record.request_ids and not record.num_prompt_tokens:
            self._last_plain = self._now
        self._asked = _NOBODY
        if len(self._waiting) >= (_TOGETHER if self.is_drafting else _TOGETHER_OFF):
            self._learn_waiting()

    def _learn_waiting(self) -> None:
        is_telling = len(self._waiting) <= _AT_ENDS or any(seen.asked for seen in self._waiting)
        for place, seen in enumerate(self._waiting):
            # Of a long run of plain steps the first and the last are compared with drafted ones.
            if is_telling or place < _AT_ENDS // 2 or place >= len(self._waiting) - _AT_ENDS // 2:
                self.side_by_side.observe(seen.record)
            else:
                self.side_by_side.skip()
            self.reading_up.observe(seen.record, self.capacity)
            if seen.asked:
                self.fares.learn(*seen)
        self._waiting.clear()

    def _needs_plain_step(self, load: Load) -> bool:
        """Two at a time: the first one after drafts finds nothing it needs in the processor's caches."""
        if load.num_prompt_tokens:
            return False
        if self._now == self._measured + 1:
            return True
        enough = _FEW if self._advantage > _BEYOND_DOUBT else _ENOUGH
        if self.side_by_side.num_pairs(load.num_requests, self._num_chosen) < enough:
            spacing: float = _SOON
        else:
            lost = 2 * (self._advantage - 1) / self._length  # of a drafted step's seconds, by two plain ones
            spacing = max(lost / self.settings.probe_share, _SOONEST)
        if self._now - self._last_plain > spacing:
            self._measured = self._now
            return True
        return False

    def _is_due(self, request_ids: Sequence[int], load: Load, mix: Hashable) -> bool:
        """A decision costs about as much as a tenth of a small step; few drafts, and none, tell little."""
        if not self.is_drafting:
            # Right before a probe: by now there may be more to read than when it was decided.
            refusal = self._refused.get(mix)
            return refusal is None or self._now >= self._end_of(refusal)
        if self._decided_for != _about(load.num_requests) or self._num_told >= self._decide_after:
            return True
        if self._now - self._decided_at >= _SELDOM_FOUND * self._decide_after:
            return True
        if (
            self._num_clear >= _CLEAR
            and _to_read(load) <= self._decided_to_read
            and self._decided_kinds.issuperset(self._kinds.values())
        ):
            return False  # of a new one nothing is known but that others like it fare well
        return 2 * sum(i not in self._decided_about for i in request_ids) > len(request_ids)  # most of them are others

    def _decide(self, request_ids: Sequence[int], load: Load) -> None:
        """Compare plain decoding with drafting for all, for the more promising half, quarter, …"""
        self._learn_waiting()
        kinds = [self._kinds.get(i) for i in request_ids]
        self._decided_at, self._share = self._now, self.fares.share_found(kinds)
        samples = self.fares.samples(self._now, request_ids, kinds)
        promising = np.argsort(-samples.sum((0, 2)), kind="stable")
        num_decoding = len(request_ids)
        costs = seconds_of_step(self.capacity, load, samples[0].size)
        plain = num_decoding / float(costs[0])
        reading = self._seconds_of_reading(request_ids, load)
        best, best_rate = 0, 0.0
        size = num_decoding
        while size:
            tokens, seconds = self._expected(samples[:, promising[:size]], num_decoding, load, costs)
            seconds += tokens * float(reading[promising[:size]].sum()) / num_decoding
            if tokens / seconds > best_rate * (1.02 if best else 1.0):  # leaving someone out must be worth it
                best, best_rate, self._length = size, tokens / seconds, seconds * plain / num_decoding
            if self.capacity.draft_seconds(size, load.context_tokens) < _CHEAP * seconds:
                break  # what would be spared by leaving someone out? What is verified of their drafts others decide
            size //= 2
        was_drafting, self._advantage = self.is_drafting, best_rate / plain
        margin = 0.0 if was_drafting else self.settings.start_above - 1
        # Of few requests drafted for, little is to be expected.
        self.is_drafting = self._advantage >= 1 + margin * best / num_decoding
        every = max(self.settings.reconsider_every, _TELLING // num_decoding) * max(1, min(4, self._num_clear))
        self._num_clear = self._num_clear + 1 if self._advantage > _CLEARLY else 0
        if self.is_drafting and not was_drafting:  # a probe may have been luck: a few drafts will tell
            every, self._num_clear = max(2, _FEW_TELLING // num_decoding), 0
        self._num_told, self._decide_after = 0, every
        self._num_chosen = best
        self._chosen = None if best == num_decoding else {request_ids[b] for b in promising[:best]}
        left_out = promising[best if self.is_drafting else 0 :]
        if len(left_out):
            few = left_out[: _num_probed(len(left_out))]
            whole, some = (self._loss(samples[:, rows], num_decoding, load, costs) for rows in (left_out, few))
            # Where drafts nearly pay, to draft for all loses little, and tells more.
            self._probes_all = whole < 2 * some
            allowed = self.settings.probe_share * num_decoding / plain  # seconds to lose in each step
            self._probe_spacing = 2 * min(whole, 2 * some) / allowed

    def _seconds_of_reading(self, request_ids: Sequence[int], load: Load) -> Floats:
        """[B]  of the drafter for each token committed: what lies before a request that was not drafted for yet, and for the
        others, which have been read, the prompts that are to come.
        """
        to_come, tokens = self.reading_up.seconds_per_token, self.reading_up.tokens_per_prompt
        ahead = self.reading_up.seconds(load.context_tokens / load.num_requests) / tokens
        return np.array([to_come if i in self.fares else ahead for i in request_ids])

    def _loss(self, samples: Floats, num_decoding: int, load: Load, costs: Floats) -> float:
        """Seconds lost by drafting for these requests [n, b, K] only to learn."""
        tokens, seconds = self._expected(samples, num_decoding, load, costs)
        plain = float(costs[0]) / num_decoding
        piled_up = self.reading_up.seconds(load.context_tokens * samples.shape[1] / num_decoding)
        # Even a probe that pays costs something: it disturbs what was found to be best. It is two steps that read once.
        return max(seconds - tokens * plain, 0.02 * seconds) + piled_up / 2

    def _expected(self, samples: Floats, num_decoding: int, load: Load, costs: Floats) -> tuple[float, float]:
        """Tokens and seconds of a step that drafts for these requests [n, b, K] and verifies the best of it.

        costs [b * K + 1 or more]  seconds of verifying 0, 1, … draft tokens, without drafting
        """
        num, num_asked = samples.shape[:2]
        drafting = self.capacity.draft_seconds(num_asked, round(load.context_tokens * num_asked / num_decoding))
        tokens = np.empty((num, samples[0].size + 1))
        tokens[:, 0] = 0.0
        np.cumsum(-np.sort(-samples.reshape(num, -1), axis=1), 1, out=tokens[:, 1:])
        tokens += num_decoding
        seconds = costs[: tokens.shape[1]] + drafting
        best = (tokens / seconds).argmax(1)
        excess = self.side_by_side.excess(self.capacity, load, num_asked)
        found, in_vain = self._share, 1 - self._share
        expected = found * self._recent_mean(tokens[np.arange(num), best]) + in_vain * num_decoding
        return expected, excess * (found * self._recent_mean(seconds[best]) + in_vain * float(seconds[0]))

    def _recent_mean(self, values: Floats) -> float:
        """Of values [n], newest first."""
        weights = _recency(len(values), self.settings.half_life)
        return float(weights @ values)

    def _probes(self, request_ids: Sequence[int], left_out: Sequence[int]) -> list[int]:
        """Rarely, some of those left out: those not drafted for the longest, as often as what it loses allows."""
        if self._now == self._last_probe + 1:  # what the first step of a probe takes is spent on reading what piled up
            self._decided_for = None
            return [b for b in left_out if request_ids[b] in self._probed]
        if self._now - self._last_probe < self._probe_spacing:
            return []
        self._last_probe = self._now
        order = self.fares.order()
        oldest = sorted(left_out, key=lambda b: order.get(request_ids[b], -1))
        rows = oldest if self._probes_all else oldest[: _num_probed(len(left_out))]
        self._probed = {request_ids[b] for b in rows}
        return rows


@lru_cache(maxsize=64)
def _recency(num: int, half_life: float) -> Floats:
    """Weights [num] of drafts, newest first."""
    weights = 0.5 ** (np.arange(num) / half_life)
    return weights / weights.sum()


def _without_prompts(load: Load) -> Load:
    num_decoding = load.base_tokens - load.num_prompt_tokens
    return replace(load, base_tokens=num_decoding, num_requests=num_decoding, num_prompt_tokens=0)


def _about(num_requests: float) -> int:
    return round(2 * math.log2(num_requests))


def _to_read(load: Load) -> int:
    """By the drafter before its first draft for a request: about how much."""
    return _about(1 + load.context_tokens / load.num_requests) // 4


def _num_probed(num_left_out: int) -> int:
    return max(1, num_left_out // 8)
