"""How drafts have fared, by request, by its kind, its prompt and how long its text has become: what the guard goes by.

Texts begin alike: the first tokens of an answer are the easiest to guess, those that follow are not, and a greedy text
that begins to repeat itself is easy again. An average over a text would promise too much for most of it. And behind a
prompt that is longer than those a drafter was trained on it guesses badly, which says nothing of shorter ones.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence, Set
from dataclasses import dataclass, field
from itertools import compress, islice
from typing import NamedTuple, TypeVar

from dspark.types import StepRecord

Key = TypeVar("Key", bound=Hashable)

_MOST_REQUESTS, _MOST_STAGES = 1024, 256
_LATELY = 64  # drafts
_LIKE_OTHERS = 4.0  # drafts of others that count beside a request's own, or the luckiest would be taken for the best
_OTHERS = 24  # requests drafted for last, which tell how unlike each other texts are
_LONG_RUN = 12  # drafts of a request at one stage that count
_USUAL_OF = 96  # drafts of all requests at one stage
_MOST_SAMPLES = 8  # drafts of each request
_MOST_AGES = 12
_UNKNOWN = 0.6, 1.5  # times the tokens that texts usually get: how two more may do than those that are known
_TRUST_PRIOR, _FOUND_PRIOR = 24.0, 8.0  # draft tokens, drafts: as if all had come true before
_COUNT_MEMORY = 400.0  # of them
_EACH_AGE = 0.7  # as much as a draft at an age says of the ages beside it


def about_as_long(num_tokens: int) -> int:
    """A number for what goes before a text: up to 255, 1023, 4095 … tokens."""
    return ((num_tokens >> 8).bit_length() + 1) // 2


class Stage(NamedTuple):
    """What is known of a request before its drafts are: its kind, and about how long its text and its prompt are."""

    kind: Hashable = None
    age: int = 0
    prompt: int = 0

    @classmethod
    def of(cls, kind: Hashable, num_generated: int, num_prompt: int = 0) -> Stage:
        """A text of up to 7, 31, 63, 127 … tokens."""
        bits = num_generated.bit_length()
        return cls(kind, bits - 4 if bits > 5 else bits // 4, about_as_long(num_prompt))

    @property
    def begins(self) -> int:
        """Tokens of a text that has just come to it."""
        return 8 << self.age if self.age > 1 else 8 * self.age

    @property
    def older(self) -> Stage:
        return self._replace(age=self.age + 1)


class _Promise(NamedTuple):
    """What drafts promise: how many count, and accepted tokens promised by each."""

    num: float = 0
    tokens: float = 0.0

    def and_one(self, tokens: float, memory: int, share: float = 1.0) -> _Promise:
        """With one more, that counts so much, and so many remembered."""
        return _Promise(self.num + 1, self.tokens + share * (tokens - self.tokens) / min(self.num + 1, memory))

    def faded(self, share: float) -> _Promise:
        return _Promise(self.num * share, self.tokens)

    @property
    def weight(self) -> float:
        """Drafts that count."""
        return min(self.num, _LONG_RUN)


_NOTHING, _UNTOLD = _Promise(), Stage()


class _Hopes(NamedTuple):
    """Accepted draft tokens, and those that were expected, up to a step."""

    accepted: float = 0.0
    hoped: float = 0.0
    when: int = 0


@dataclass
class _Fare:
    """One request's drafts: (step, survival) of the last ones, and what they promised at each stage of its text."""

    rows: deque[tuple[int, Sequence[float]]]
    by_stage: dict[Stage, _Promise] = field(default_factory=dict)

    def add(self, now: int, row: Sequence[float], stage: Stage, memory: int) -> None:
        if self.rows and now - self.rows[-1][0] > memory:
            self.by_stage.clear()
        self.rows.append((now, row))
        self.by_stage[stage] = self.by_stage.get(stage, _NOTHING).and_one(sum(row), _LONG_RUN)


class Fares:
    """What drafts were believed to give, and gave, lately.

    num_remembered  drafts of each request that are remembered
    memory          steps after which a draft says no more of its request than others say
    """

    def __init__(self, num_remembered: int, memory: int) -> None:
        self._num_remembered, self._memory = num_remembered, memory
        self._by_request: OrderedDict[int, _Fare] = OrderedDict()
        self._hopes: dict[int, _Hopes] = {}  # by about how many requests
        self._now = 0
        self._promises: dict[Stage, tuple[_Promise, int]] = {}  # of all requests, and when the last one was
        self._promise_of_all = _NOTHING
        self._lately: deque[tuple[int, Sequence[float]]] = deque(maxlen=_LATELY)
        self._trust: dict[Stage, tuple[float, float]] = {}  # draft tokens accepted, and promised
        self._found: dict[Stage, tuple[float, float]] = {}  # drafts that had a token, and all asked for

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._by_request

    def knows(self, request_id: int, stage: Stage) -> bool:
        """Whether it was drafted for at this stage lately."""
        fare = self._by_request.get(request_id)
        return fare is not None and stage in fare.by_stage

    def num_known(self, request_ids: Sequence[int]) -> int:
        """How many of them were drafted for lately."""
        return sum(map(self._by_request.__contains__, request_ids))

    def order(self) -> dict[int, int]:
        """Requests by when they were drafted for last: the smallest number longest ago."""
        return {request_id: n for n, request_id in enumerate(self._by_request)}

    def learn(self, now: int, record: StepRecord, asked: Set[int], stages: dict[int, Stage]) -> None:
        """Of a step: the requests that were drafted for (asked), and what was known of them."""
        nothing = [[0.0]] * len(record.request_ids)
        survival: list[list[float]] | None = None if record.survival is None else record.survival.tolist()
        kept = nothing if record.kept is None else record.kept.tolist()
        for b, request_id in enumerate(record.request_ids):
            if request_id not in asked:
                continue
            stage, has_found = stages.get(request_id, _UNTOLD), record.drafted[b] > 0
            _count(self._found, stage, has_found, 1, _FOUND_PRIOR)
            if survival is None:  # nothing was believed of it
                self._fare_of(request_id)
            elif has_found:
                self._remember(now, request_id, stage, survival[b])
                _count(self._trust, stage, record.accepted[b], sum(compress(survival[b], kept[b])), _TRUST_PRIOR)

    def trust(self, stage: Stage | None = None) -> float:
        """Accepted draft tokens for each that beliefs had promised, lately, to requests at this stage; None: to all."""
        accepted, promised = (stage and self._trust.get(stage)) or (_overall(self._trust), 1.0)
        return min(1.5, accepted / promised)

    def compare(self, now: int, num_requests: int, accepted: float, hoped: float) -> None:
        """Of a step that was drafted for because so many accepted tokens were expected."""
        before = self._hopes.get(num_requests.bit_length(), _Hopes())
        fade = min(self._faded_since(before.when, now), _COUNT_MEMORY / max(before.hoped, 1.0))
        self._hopes[num_requests.bit_length()] = _Hopes(
            before.accepted * fade + accepted, before.hoped * fade + hoped, now
        )

    def came_true(self, now: int, num_requests: int) -> float:
        """Accepted tokens for each that was expected where drafts were believed to pay: whatever is chosen because it looks
        good was lucky, too, and gives less afterwards. While nothing is chosen this is forgotten.
        """
        accepted, hoped, when = self._hopes.get(num_requests.bit_length(), _Hopes())
        fade = self._faded_since(when, now)
        return min(1.5, (_TRUST_PRIOR + fade * accepted) / (_TRUST_PRIOR + fade * hoped))

    def _faded_since(self, when: int, now: int) -> float:
        return 0.5 ** ((now - when) / (2 * self._memory))

    def share_found(self, stages: Sequence[Stage]) -> float:
        """Of drafts asked for: how many have a token. Whoever seldom finds one asks in vain, and in bursts finds many: what
        drafts are worth is told by those that were found.
        """
        shares = (self._found.get(stage, (1.0, 1.0)) for stage in stages)
        return sum(found / asked for found, asked in shares) / len(stages)

    def samples(self, now: int, request_ids: Sequence[int], stages: Sequence[Stage]) -> list[list[list[float]]]:
        """n times B rows  what the last drafts promised, newest first, each request's own; others' where it has too few.

        Scaled so that each request promises what drafts for others promise at its stage, drawn towards how its own drafts
        have fared beside theirs.
        """
        self._now = now
        num = max(1, min(_MOST_SAMPLES, self._num_remembered // len(request_ids)))
        since = now - self._memory
        pool = [row for _, row in self._lately] or [[0.0]]
        by_request = []
        for b, (request_id, stage) in enumerate(zip(request_ids, stages, strict=True)):
            fare, promise = self._by_request.get(request_id), self.expected(stage)
            newest = () if fare is None else islice(reversed(fare.rows), num)
            rows = [row for when, row in newest if when > since]
            if fare is not None and rows:
                promise *= self._beside_others(fare, stage)
            rows += (pool[-1 - (b + n) % len(pool)] for n in range(len(rows), num))
            factor = promise * num / max(1e-9, sum(map(sum, rows)))
            by_request.append([[min(1.0, factor * chance) for chance in row] for row in rows])
        return [list(rows) for rows in zip(*by_request, strict=True)]

    def expected(self, stage: Stage) -> float:
        """Tokens that are accepted of a draft at this stage, as far as is known of others there."""
        return self.trust(stage) * self._usual(stage)

    def ease(self, stages: Sequence[Stage]) -> list[float]:
        """What rounds with drafts of single texts at these stages give, in what such rounds usually give."""
        newest = [*islice(reversed(self._by_request.values()), _OTHERS)]
        alike = [f.by_stage[stage] for stage in {*stages} for f in newest if stage in f.by_stage]
        usual = sum(promise.tokens for promise in alike) / max(1, len(alike))
        known = (1 + (p.tokens - usual) * p.weight / (p.weight + _LIKE_OTHERS) / (1 + usual) for p in alike)
        return [*known, *_UNKNOWN]

    def _usual(self, stage: Stage) -> float:
        """Accepted tokens promised by a draft of requests at this stage: what is long ago, or little, is drawn towards what
        drafts promise at the nearest age of their kind, or nobody would find out that texts have become easier there.
        """
        own, when = self._promises.get(stage, (_NOTHING, 0))
        weight = own.num * self._faded_since(when, self._now)
        return (weight * own.tokens + _LIKE_OTHERS * self._beside(stage)) / (weight + _LIKE_OTHERS)

    def _beside(self, stage: Stage) -> float:
        """What drafts promise at the nearest age, the younger first; behind prompts of another length where that is new."""
        for distance in range(1, _MOST_AGES):
            for age in (stage.age - distance, stage.age + distance):
                found = self._promises.get(stage._replace(age=age))
                if found is not None:
                    return found[0].tokens
        of_kind = [at for at in self._promises if at.kind == stage.kind and at.prompt != stage.prompt]
        if not of_kind:
            return self._promise_of_all.tokens
        nearest = min(of_kind, key=lambda at: (abs(at.prompt - stage.prompt), abs(at.age - stage.age)))
        return self._promises[nearest][0].tokens

    def _beside_others(self, fare: _Fare, stage: Stage) -> float:
        """How many times as much as others a request's drafts promise, by those at about this stage and some of others."""
        own = others = _LIKE_OTHERS * self._usual(stage)
        for at, promise in fare.by_stage.items():
            weight = promise.weight * _EACH_AGE ** abs(at.age - stage.age)
            own, others = own + weight * promise.tokens, others + weight * self._usual(at)
        return own / others if others else 1.0

    def _fare_of(self, request_id: int) -> _Fare:
        """Of the request that was drafted for last."""
        if request_id not in self._by_request:
            self._by_request[request_id] = _Fare(deque(maxlen=self._num_remembered))
            if len(self._by_request) > _MOST_REQUESTS:
                self._by_request.popitem(last=False)
        self._by_request.move_to_end(request_id)
        return self._by_request[request_id]

    def _remember(self, now: int, request_id: int, stage: Stage, row: Sequence[float]) -> None:
        fare, promised, self._now = self._fare_of(request_id), sum(row), now
        fare.add(now, row, stage, self._memory)
        share = min(1.0, _LONG_RUN / fare.by_stage[stage].num)  # or one long text would stand for all
        before, when = self._promises.get(stage, (_NOTHING, now))
        before = before.faded(self._faded_since(when, now) ** 2)  # of what is new more is believed
        self._promises[stage] = before.and_one(promised, _USUAL_OF, share), now
        self._promise_of_all = self._promise_of_all.and_one(promised, _USUAL_OF, share)
        if len(self._promises) > _MOST_STAGES:
            del self._promises[next(iter(self._promises))]
        self._lately.append((now, row))


def _count(counts: dict[Key, tuple[float, float]], key: Key, yes: float, all: float, prior: float) -> None:
    """Add to what is counted of a stage, or of whatever else; old counts fade."""
    if key not in counts:
        counts[key] = prior * _overall(counts), prior
    before, all_before = counts[key]
    fade = min(1.0, _COUNT_MEMORY / all_before)
    counts[key] = (before * fade + yes, all_before * fade + all)
    if len(counts) > _MOST_STAGES:
        del counts[next(iter(counts))]


def _overall(counts: dict[Key, tuple[float, float]]) -> float:
    """Share over all of them, by which a new one is judged at first; 1 before there are any."""
    yes, all = (sum(count[i] for count in counts.values()) for i in (0, 1))
    return yes / all if all else 1.0
