"""Never slower than plain decoding: which requests are worth drafting for at all.

Drafting is paid for before it is known what it is worth, so the guard goes by how the last drafts of each request, and
of all, were believed to fare, by what was accepted of them, and by what steps and drafts cost. The paper leaves this
open ("the draft is always paid for", section 6).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import zip_longest
from typing import NamedTuple

from dspark.budget.capacity import Capacity
from dspark.budget.fares import Fares, Stage
from dspark.budget.outlook import Outlook
from dspark.budget.prospects import Prospects
from dspark.budget.reading_up import ReadingUp
from dspark.budget.side_by_side import SideBySide, num_unsettled
from dspark.types import Load, StepRecord


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
    decide_share      of all seconds about so much is spent at most on deciding, off, to stay off
    """

    min_observations: int = 24
    start_above: float = 1.04
    probe_share: float = 0.003
    num_remembered: int = 24
    half_life: float = 8.0
    memory: int = 200
    reconsider_every: int = 8
    decide_share: float = 0.005


# Steps that are learned from at a time: between two the processor's caches forget how it is done.
_TOGETHER, _TOGETHER_OFF = 8, 64
_AT_ENDS = 12
_MOST_MIXES = 256
_HOLDS = 512  # steps at most that it is not decided anew whether to start
_NOBODY: frozenset[int] = frozenset()
_UNTOLD = Stage()
_TIMED = 3  # plain steps that are taken together to be timed, after those that still suffer from drafts
_ENOUGH = 4  # pairs of plain and drafted steps before the comparison is believed: of few, most may be disturbed
_FEW, _BEYOND_DOUBT = 2, 2.0  # which does not matter where drafts give so many times as many tokens per second
_SOON = 8  # steps between such runs until then
_SOONEST = 60  # and afterwards, where it loses nothing
_SELDOM_FOUND = 4  # times as many steps without a draft tell as much
_TELLING, _FEW_TELLING = 16, 4  # drafts that are worth a decision, and that may undo the last one
_CLEARLY = 1.15  # times as many tokens per second,
_CLEAR = 2  # as often as this, one decision after the other
_CHEAP = 0.06  # of a step
_WORTH_IT = 1.08  # times as many tokens per second, by leaving requests out
_LOOK = 6  # drafts until it is known that a text is no easier than others
_TOOK = 5  # decisions whose seconds are remembered
_UNREST = 2.0  # plain steps that it costs to begin drafting or to end it: caches, decisions
_SINGLE = 2  # requests
_LONGEST_LOOKED_FOR = 64  # tokens of a text to count on, which may have more


class _Refusal(NamedTuple):
    """What was decided for a mix of requests that are not drafted for: it holds until a step, and says how to probe."""

    until: int
    spacing: float  # steps between probes that what they are believed to lose allows
    probes_all: bool
    tries_new: bool  # texts that nobody has drafted for yet may be so much easier that a few drafts for them pay
    ends: Mapping[Stage, int]  # tokens of a text at each stage, of few requests, from which on drafts may pay


class _Agreement(NamedTuple):
    """What was decided for few new requests that are drafted for: it holds until a step for the next ones like them. Fields
    are the guard's.
    """

    until: int
    advantage: float
    hoped: float
    length: float
    paying_stages: set[Stage]


class _Seen(NamedTuple):
    """A step to learn from, the requests that were drafted for, and what was known of them."""

    now: int
    record: StepRecord
    asked: frozenset[int]
    stages: dict[int, Stage]
    hoped: float  # accepted tokens that were expected when it was decided to draft; 0 if it was not


class Guard:
    """Says which requests are drafted for: `choose` before drafting, `observe` after the step."""

    def __init__(self, capacity: Capacity, settings: GuardSettings | None = None) -> None:
        self.capacity, self.settings = capacity, settings or GuardSettings()
        self.is_drafting = True
        self.reason: str | None = None  # why `choose` left requests out
        self.fares = Fares(self.settings.num_remembered, self.settings.memory)
        self._stages: dict[int, Stage] = {}
        self._asked = _NOBODY  # drafted for in this step
        self._waiting: list[_Seen] = []
        self._num_judged = 0
        self.side_by_side, self.reading_up = SideBySide(), ReadingUp()
        self._advantage = 1.0  # tokens per second over plain decoding, as believed when it was last decided
        self._num_clear = 0  # decisions, one after the other, to draft because it clearly pays
        self._hoped = 0.0  # accepted tokens of each draft, as expected when it was last decided
        self._length = 1.0  # seconds of a step with drafts, in those of a plain one
        self._reads_first = 0.0  # plain steps that the drafter takes to read what it has to before it drafts
        self._probe_spacing = 0.0  # steps between probes that what they are believed to lose allows
        self._probes_all = True
        self._probed: set[int] = set()
        self._tried: set[tuple[int, Stage]] = set()
        self._refused: dict[Hashable, _Refusal] = {}  # by what is known of requests
        self._agreed: dict[Hashable, _Agreement] = {}  # likewise
        self._decided_mix: Hashable = None
        self._resting: Sequence[int] = ()  # requests of which nobody is drafted for
        self._rests_until = self._decides_from = 0.0  # before this step, and before this one it is too soon to decide
        self._took: deque[float] = deque(maxlen=_TOOK)  # plain steps that decisions took
        self._chosen: set[int] | None = None  # None: all
        self._decided_for: int | None = None  # about so many requests
        self._decided_about: set[int] = set()
        self._decided_stages: set[Stage] = set()
        self._paying_stages: set[Stage] = set()  # of few requests: these, and older ones at which drafts surely pay
        self._clear_stages: set[Stage] = set()  # at which drafts clearly paid in all these decisions
        self._decided_to_read = 0
        self._decided_at = self._now = 0
        self._num_told, self._decide_after = 0, 0  # steps with drafts since then, and after how many to decide again
        self._last_plain = self._last_probe = 0
        self._plain_until = 0  # plain steps are taken before this one, to be timed
        self._no_plain_until = 0.0  # and none up to this one: it is known what they take

    def choose(
        self,
        request_ids: Sequence[int],
        load: Load,
        kinds: Sequence[Hashable] = (),
        num_generated: Sequence[int] = (),
        num_prompt: Sequence[int] = (),
    ) -> list[int]:
        """Places in request_ids to draft for; `reason` says why others are not, if any.

        kinds          of the requests, where something is known of them: those of one kind are expected to fare alike
        num_generated  tokens of each: texts of about one length are, too
        num_prompt     tokens before them, likewise
        """
        self._now += 1
        self.reason = "cost"
        # Where drafts do not pay, most steps are about the same requests as the one before: nothing is looked up for them.
        if self._now < self._rests_until and request_ids == self._resting:
            return []
        told = zip_longest(request_ids, kinds, num_generated, num_prompt, fillvalue=0)
        stages = [Stage.of(kind, *lengths) for _, kind, *lengths in told]
        if not self.is_drafting and self._rests(request_ids, load, stages, num_generated):
            return []
        self._stages = dict(zip(request_ids, stages, strict=False))
        rows = self._rows(request_ids, load)
        self._asked = frozenset(request_ids[b] for b in rows)
        return rows

    def _rests(
        self, request_ids: Sequence[int], load: Load, stages: Sequence[Stage], num_generated: Sequence[int]
    ) -> bool:
        """Whether what was decided for such requests, not to draft for them, still holds, or it is too soon to decide."""
        if self._now <= self._last_probe + 2:  # which has two steps, and is judged after them
            return False
        mix = self._mix(request_ids, load, stages)
        refusal = self._refused.get(mix)
        if refusal is None:
            until: float = self._now if self._is_agreed(mix) else self._decides_from
        elif refusal.tries_new and self._new_among(request_ids, stages):
            return False
        else:
            until = max(self._end_of(refusal), self._decides_from)
            # A plain step is a token of each text.
            grown = (refusal.ends[stage] - n for stage, n in zip(stages, num_generated, strict=False) if refusal.ends)
            until = min(until, self._now + min(grown, default=_HOLDS))
        self._resting, self._rests_until = request_ids, until
        return self._now < until

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
            self._refused.pop(self._mix(request_ids, load, self._stages.values()), None)
            return self._probes(request_ids, everyone)
        is_held = not self.is_drafting and self._now < self._decided_at + _HOLDS
        if is_held and _about(len(request_ids)) < _about(load.num_requests):
            # While others read their prompts, drafts for so few may pay; but the others decode in the next step.
            self.reason = "cost"
            return []
        mix = None if self.is_drafting else self._mix(request_ids, load, self._stages.values())
        if self._is_due(request_ids, load, mix):
            if len(request_ids) <= _SINGLE:  # known by their own drafts: those of the last steps, too
                self._learn_waiting()
                mix = None
            mix = mix or self._mix(request_ids, load, self._stages.values())
            if mix == self._decided_mix or not self._recall(request_ids, load, mix):
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

    def _mix(self, request_ids: Sequence[int], load: Load, stages: Iterable[Stage]) -> Hashable:
        """What a decision is true of: every mix that is told from others is one more chance to be wrong about."""
        if len(request_ids) <= _SINGLE:  # texts differ, each is known by its own drafts
            known: Hashable = tuple(i if i in self.fares else None for i in request_ids)
            return frozenset(stages), known
        are_known = 2 * self.fares.num_known(request_ids) >= len(request_ids)
        return (
            _about(load.num_requests),
            frozenset(stage.kind for stage in stages),
            None if are_known else _to_read(load),
        )

    def _recall(self, request_ids: Sequence[int], load: Load, mix: Hashable) -> bool:
        """Do for few requests what was decided for the last ones like them; False: there was nothing, or long ago."""
        refusal = self._refused.get(mix) if len(request_ids) <= _SINGLE else None
        if self._is_agreed(mix):
            _, self._advantage, self._hoped, self._length, self._paying_stages = self._agreed[mix]
            self.is_drafting, self._chosen = True, None
        elif refusal is not None and self._now < self._end_of(refusal):
            self.is_drafting = False
        else:
            return False
        self._decided_for, self._decided_about = _about(load.num_requests), set(request_ids)
        self._decided_stages, self._decided_mix = {*self._stages.values()}, mix
        return True

    def _is_agreed(self, mix: Hashable) -> bool:
        """Where it is too soon to decide anew, an old agreement is better than none."""
        is_too_soon = not self.is_drafting and self._now < self._decides_from
        return mix in self._agreed and (self._now < self._agreed[mix].until or is_too_soon)

    def _reconsider(self, request_ids: Sequence[int], load: Load, mix: Hashable) -> None:
        if self._decided_for != _about(load.num_requests):
            self._num_clear = 0
        self._decided_for, self._decided_about = _about(load.num_requests), set(request_ids)
        self._decided_stages, self._decided_to_read = {*self._stages.values()}, _to_read(load)
        was_drafting = self.is_drafting
        self._decide(request_ids, _without_prompts(load))  # the next step may have none
        self._decided_mix = mix
        self._agreed.pop(mix, None)
        if self.is_drafting:
            self._agree(request_ids, mix)
            return
        # Where they would pay but for what is to be read first, there is nothing to find out.
        tries_new = self._advantage < self.settings.start_above and self._may_be_easy(len(request_ids))
        stages = self._decided_stages if len(request_ids) <= _SINGLE else ()
        ends = {stage: self._outlook.pays_from(stage, self.settings.start_above) for stage in stages}
        self._refused[mix] = _Refusal(self._now + _HOLDS, self._probe_spacing, self._probes_all, tries_new, ends)
        if not was_drafting and self._took:
            took = sorted(self._took)[len(self._took) // 2]
            spacing = min(took / self.settings.decide_share, _HOLDS)  # the first ones take many times as long
            self._decides_from = max(self._now, self._decides_from) + spacing
        if len(self._refused) > _MOST_MIXES:
            del self._refused[next(iter(self._refused))]

    def _agree(self, request_ids: Sequence[int], mix: Hashable) -> None:
        """It was decided to draft: forget what was decided before, and of few new requests remember this for the next."""
        self._resting = ()
        if len(request_ids) > _SINGLE:
            self._refused.clear()  # what drafts are worth has changed
            return
        self._refused.pop(mix, None)
        is_new = not self.fares.num_known(request_ids)
        # Where there is much to read first, every text is worth a decision.
        if is_new and self._chosen is None and self._reads_first <= _UNREST:
            until = self._now + _HOLDS
            self._agreed[mix] = _Agreement(until, self._advantage, self._hoped, self._length, self._paying_stages)
            if len(self._agreed) > _MOST_MIXES:
                del self._agreed[next(iter(self._agreed))]

    def _rest(self, request_ids: Sequence[int], mix: Hashable) -> list[int]:
        """Draft for nobody, or for a probe."""
        self.reason = "cost"
        refusal = self._refused[mix]
        self._probe_spacing, self._probes_all = refusal.spacing, refusal.probes_all
        rows = self._probes(request_ids, list(range(len(request_ids))))
        if not rows and refusal.tries_new:
            rows = self._new_among(request_ids, [*self._stages.values()])
            if rows:
                self._last_probe, self._probed = self._now, {request_ids[b] for b in rows}
            self._tried = {*self._stages.items()}
        return rows

    def _new_among(self, request_ids: Sequence[int], stages: Sequence[Stage]) -> list[int]:
        """Places of requests that were never drafted for at these stages, if they are half of all or more, and all are few:
        what single texts are like says little of many.
        """
        if len(request_ids) > _SINGLE:
            return []
        both = enumerate(zip(request_ids, stages, strict=True))
        new = [b for b, each in both if each not in self._tried and not self.fares.knows(*each)]
        return new if 2 * len(new) >= len(request_ids) else []

    def _may_be_easy(self, num_requests: int) -> bool:
        """Whether drafting a little for texts of which nothing is known is believed to pay, by how unlike others have been."""
        ease, spread = self.fares.ease([*self._stages.values()]), 1 / math.sqrt(num_requests)
        advantages = [self._advantage * (1 + (times - 1) * spread) for times in ease]
        gain = sum(max(advantage - 1, 0.0) for advantage in advantages) / len(ease)
        loss = sum(max(1 - advantage, 0.0) for advantage in advantages) / len(ease)
        length = min(self.reading_up.tokens_per_prompt, _LONGEST_LOOKED_FOR)
        return length * gain > _LOOK * self._length * loss + _UNREST

    def observe(self, record: StepRecord) -> None:
        """Learn how drafts fare, and what they cost beside plain steps."""
        # What was expected is true of texts as old as those it was decided about.
        is_as_decided = self.is_drafting and self._decided_stages.issuperset(self._stages.values())
        hoped = self._hoped * len(self._asked) if is_as_decided else 0.0
        self._waiting.append(_Seen(self._now, record, self._asked, self._stages, hoped))
        self._num_judged += len(self._asked)
        self._num_told += bool(self._asked) and any(record.drafted)
        if not self._asked and record.request_ids and not record.num_prompt_tokens:
            self._last_plain, self._no_plain_until = self._now, 0.0
            if self._decided_at == self._now and record.step_seconds > 0:
                self._took.append(record.draft_seconds / record.step_seconds)
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
                self.fares.learn(seen.now, seen.record, seen.asked, seen.stages)
            if seen.hoped:
                self.fares.compare(seen.now, len(seen.record.request_ids), sum(seen.record.accepted), seen.hoped)
        self._waiting.clear()

    def _needs_plain_step(self, load: Load) -> bool:
        """Many at a time: the first ones after drafts find little of what they need in the processor's caches."""
        if load.num_prompt_tokens:
            return False
        if self._now < self._plain_until:
            return True
        if self._now <= self._no_plain_until:
            return False
        num_plain = num_unsettled(load.num_requests) + _TIMED
        enough = _FEW if self._advantage > _BEYOND_DOUBT else _ENOUGH
        if self.side_by_side.num_pairs(load.num_requests) < enough:
            spacing: float = _SOON
        else:
            lost = num_plain * (self._advantage - 1) / self._length  # of a drafted step's seconds, by plain ones
            spacing = max(lost / self.settings.probe_share, _SOONEST)
        self._no_plain_until = self._last_plain + spacing
        if self._now > self._no_plain_until:
            self._plain_until = self._now + num_plain
            return True
        return False

    def _is_due(self, request_ids: Sequence[int], load: Load, mix: Hashable) -> bool:
        """A decision takes a good part of a small step; few drafts, and none, tell little."""
        if not self.is_drafting:
            # Right before a probe: by now there may be more to read than when it was decided.
            refusal = self._refused.get(mix)
            return refusal is None or self._now >= self._end_of(refusal)
        if self._decided_for != _about(load.num_requests) or self._num_told >= self._decide_after:
            return True
        if self._now - self._decided_at >= _SELDOM_FOUND * self._decide_after:
            return True
        stages = self._stages.values()
        is_like = self._clear_stages.issuperset(stages) and _to_read(load) <= self._decided_to_read
        if self._num_clear >= _CLEAR and is_like:
            return False  # of a new one nothing is known but that others like it fare well
        if len(request_ids) <= _SINGLE:
            return not (self._paying_stages.issuperset(stages) and self._decided_about.issuperset(request_ids))
        return 2 * sum(i not in self._decided_about for i in request_ids) > len(request_ids)  # most of them are others

    def _decide(self, request_ids: Sequence[int], load: Load) -> None:
        """Compare plain decoding with drafting for all, for the more promising half, quarter, …"""
        self._learn_waiting()
        stages = [self._stages.get(i, _UNTOLD) for i in request_ids]
        self._decided_at = self._now
        prospects = self._prospects(request_ids, load, stages)
        plain = prospects.plain_rate
        reading = self._seconds_of_reading(request_ids)
        num_decoding = size = len(request_ids)
        came_true = self.fares.came_true(self._now, num_decoding) if num_decoding <= _SINGLE else 1.0
        best, best_rate = 0, 0.0
        while size:
            promising = prospects.promising[:size]
            tokens, seconds = prospects.of(promising)
            hoped = tokens - num_decoding
            tokens = num_decoding + came_true * hoped
            seconds += tokens * sum(reading[b] for b in promising) / num_decoding
            if tokens / seconds > best_rate * (_WORTH_IT if best else 1.0):
                best, best_rate, self._length = size, tokens / seconds, seconds * plain / num_decoding
                self._hoped = hoped / size
            if self.capacity.draft_seconds(size, load.context_tokens) < _CHEAP * seconds:
                break  # what would be spared by leaving someone out? What is verified of their drafts others decide
            size //= 2
        self._advantage = best_rate / plain
        # What few others were drafted for is no reason to go on.
        was_drafting = self.is_drafting and (num_decoding > _SINGLE or self.fares.num_known(request_ids) > 0)
        # Of few requests drafted for, little is to be expected.
        least = 1.0 if was_drafting else 1 + (self.settings.start_above - 1) * best / num_decoding
        self.is_drafting = self._advantage >= least
        if num_decoding <= _SINGLE or self.is_drafting:
            unread = sum(i not in self.fares for i in request_ids)
            ahead = self.reading_up.seconds(unread * load.context_tokens / load.num_requests, min(1, unread))
            self._reads_first = ahead * plain / num_decoding
            self.is_drafting = self._is_worth_it(stages, was_drafting, least, self._reads_first)
        if num_decoding <= _SINGLE and self.is_drafting:
            self._paying_stages = {older for stage in stages for older in self._outlook.while_it_pays(stage)}
        every = max(self.settings.reconsider_every, _TELLING // num_decoding) * max(1, min(4, self._num_clear))
        self._num_clear = self._num_clear + 1 if self.is_drafting and self._advantage > _CLEARLY else 0
        self._clear_stages = self._clear_stages.union(stages) if self._num_clear else set()
        if self.is_drafting and not was_drafting:  # a probe may have been luck: a few drafts will tell
            every, self._num_clear = max(2, _FEW_TELLING // num_decoding), 0
        self._num_told, self._decide_after, self._no_plain_until = 0, every, 0.0
        self._chosen = None if best == num_decoding else {request_ids[b] for b in prospects.promising[:best]}
        left_out = prospects.promising[best if self.is_drafting else 0 :]
        if left_out:
            few = left_out[: _num_probed(len(left_out))]
            whole, some = (self._loss(prospects, rows, load) for rows in (left_out, few))
            # Where drafts nearly pay, to draft for all loses little, and tells more.
            self._probes_all = whole < 2 * some
            allowed = self.settings.probe_share * num_decoding / plain  # seconds to lose in each step
            self._probe_spacing = 2 * min(whole, 2 * some) / allowed

    def _prospects(self, request_ids: Sequence[int], load: Load, stages: Sequence[Stage]) -> Prospects:
        samples = self.fares.samples(self._now, request_ids, stages)
        share = self.fares.share_found(stages)
        weights = _recency(len(samples), self.settings.half_life)
        return Prospects(self.capacity, self.side_by_side, load, samples, weights, share)

    def _is_worth_it(self, stages: Sequence[Stage], was_drafting: bool, least: float, reading: float) -> bool:
        """Whether to draft from here on. To begin or to end is a disturbance, texts that were not drafted for yet must be
        read first (in plain steps), and what that gains lasts only until they have grown: their beginnings may pay where
        what follows does not.
        """
        if self._advantage < 1:
            return was_drafting and self._outlook.steps_saved(stages, by_drafting=False) <= _UNREST
        saved = self._outlook.steps_saved(stages, by_drafting=True) - reading
        return saved >= 0 if was_drafting else self._advantage >= least and saved > _UNREST

    @property
    def _outlook(self) -> Outlook:
        return Outlook(self._advantage, self.fares, self.reading_up.tokens_per_prompt)

    def _seconds_of_reading(self, request_ids: Sequence[int]) -> list[float]:
        """[B]  of the drafter for each token committed: for requests that were drafted for, the prompts that are to come; what
        lies before the others is read once.
        """
        return [self.reading_up.seconds_per_token if i in self.fares else 0.0 for i in request_ids]

    def _loss(self, prospects: Prospects, rows: Sequence[int], load: Load) -> float:
        """Seconds lost by drafting for these requests only to learn."""
        tokens, seconds = prospects.of(rows)
        piled_up = self.reading_up.seconds(load.context_tokens * len(rows) / load.num_requests)
        # Even a probe that pays costs something: it disturbs what was found to be best. It is two steps that read once.
        return max(seconds - tokens / prospects.plain_rate, 0.02 * seconds) + piled_up / 2

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
def _recency(num: int, half_life: float) -> list[float]:
    """Weights (num) of drafts, newest first."""
    weights = [0.5 ** (n / half_life) for n in range(num)]
    return [weight / sum(weights) for weight in weights]


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
