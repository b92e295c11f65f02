"""Prefix caching: the same tokens with a hit and without, the same features for drafters, and every slot accounted for."""

from __future__ import annotations

import random

import pytest
import torch

from dspark import load_drafter, load_target
from dspark.drafters.draft_model import SelfDrafter
from dspark.drafters.ngram import NGramDrafter
from dspark.engine.engine import Engine
from dspark.engine.prefix_cache import RUN, PrefixCache
from dspark.target import Target
from dspark.target.kv_cache import KVCache
from dspark.types import FeaturePiece, Request, SamplingParams, Span
from engine.models import VOCAB_SIZE, OracleDrafter, random_target, reference_features
from target.conftest import plain_model

LAYERS = (0, 1)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return random_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def expected(target, conversations):
    return plainly(target, conversations)


@pytest.fixture
def small(target):
    """`small(n)` leaves the target n slots for one test."""
    limit = target.cache.limit
    yield target.resize
    target.resize(limit)


@pytest.fixture(scope="module")
def conversations():
    """Prompts that begin alike, at every kind of distance from the end of a run."""
    rng = random.Random(0)
    system = [rng.randrange(VOCAB_SIZE) for _ in range(2 * RUN + 3)]
    lengths = (0, 1, RUN - 3, RUN - 2, 5, 40, 17, 2, 9)
    prompts = [system + [rng.randrange(VOCAB_SIZE) for _ in range(n)] for n in lengths]
    return [*prompts, system[:RUN], system[: RUN + 1], [rng.randrange(VOCAB_SIZE) for _ in range(50)]]


class Reader(OracleDrafter):
    """Compares the features of every request with those of a forward over all its tokens."""

    feature_layers = LAYERS

    def __init__(self, target, texts, **options):
        super().__init__(texts, **options)
        self.target, self.seen, self.num_checked = target, {}, 0

    def propose(self, requests, rule):
        for r in requests:
            start = self.seen.get(r.id, 0)
            assert (r.features_start, len(r.features)) == (start, r.num_cached - start)
            expected = reference_features(self.target, r.tokens[: r.num_cached], LAYERS)[start:]
            torch.testing.assert_close(r.features, expected, atol=2e-4, rtol=1e-3)
            self.seen[r.id], self.num_checked = r.num_cached, self.num_checked + len(expected)
        return super().propose(requests, rule)

    def release(self, request_id):
        self.seen.pop(request_id, None)


def params_of(i: int, num_tokens: int = 24) -> SamplingParams:
    return SamplingParams(temperature=[1.0, 0.0, 0.7][i % 3], seed=i, max_tokens=num_tokens)


def plainly(target, prompts):
    return [Engine(target).generate([p], params_of(i))[0].token_ids for i, p in enumerate(prompts)]


def assert_slots_owned(engine: Engine) -> None:
    """A slot is free, or lent to the prefix cache, or what a running request or a run that one uses says is its own."""
    cache, prefixes = engine.target.cache, engine.prefixes
    cache.check()
    used: set[int] = set()
    for request in engine.batcher.running:
        assert cache.length(request.id) == request.num_cached
        used.update(cache.slots_of(request.id).tolist())
    for held in prefixes._held.values():
        for run in held.runs:
            assert run.num_users and run not in prefixes._idle
            used.update(run.slots.tolist())
    assert cache.num_free_slots == cache.limit - len(used)
    assert RUN * len(prefixes._idle) <= prefixes.max_tokens + RUN
    assert set(prefixes._held) == {r.id for r in engine.batcher.running}


def assert_contents(engine: Engine) -> None:
    """Keys and values of every run are those of a forward over the tokens that lead to it."""
    target, waiting, num_checked = engine.target, [((), run) for run in engine.prefixes._first.values()], 0
    while waiting:
        before, run = waiting.pop()
        tokens = before + run.tokens
        waiting += [(tokens, child) for child in run.children.values()]
        target.extend([Span(-1, 0, tokens)])
        for keys, values in target.cache.storage.values():
            for stored in (keys, values):
                fresh = stored[torch.from_numpy(target.cache.slots_of(-1).copy())[-RUN:]]
                torch.testing.assert_close(stored[torch.from_numpy(run.slots)], fresh, atol=2e-4, rtol=1e-3)
        target.release(-1)
        num_checked += 1
    assert num_checked


@pytest.mark.parametrize("tree", [False, True])
def test_features_and_text_are_those_of_reading_it_all(target, conversations, expected, tree):
    texts = [p + t for p, t in zip(conversations, expected, strict=True)]
    later = [[*text, 7, 11, i] for i, text in enumerate(texts)]  # the next turn of each conversation
    after = plainly(target, later)
    reader = Reader(target, texts + [p + t for p, t in zip(later, after, strict=True)], tree=tree)
    records = []
    engine = Engine(target, reader, "fixed:10", prefix_tokens=4096, observers=[records.append])
    for prompts, known in ((conversations, expected), (later, after), (conversations, expected)):
        all_params = [params_of(i) for i in range(len(prompts))]
        assert [g.token_ids for g in engine.generate(prompts, all_params)] == known
        assert_slots_owned(engine)
    assert reader.num_checked > 1000
    assert sum(r.num_prefix_found for r in records) > 0.5 * sum(r.num_prefix_asked for r in records)
    # What is found is all that there is: whole runs, short of the last token.
    again = [engine.submit(p, params_of(i)) for i, p in enumerate(later)]
    engine.step()
    assert [r.num_prompt_found for r in again] == [(len(p) - 1) // RUN * RUN for p in later]
    for request in again:
        engine.cancel(request)
    assert_contents(engine)
    assert target.num_free_slots == target.cache.limit


@pytest.mark.parametrize("kind", ["none", "ngram", "self", "chain", "tree"])
@pytest.mark.parametrize("seed", range(2))
def test_joining_leaving_and_preemption_change_nothing(target, small, conversations, expected, kind, seed):
    texts = [p + t for p, t in zip(conversations, expected, strict=True)]
    small(150)
    drafter = {"none": None, "ngram": NGramDrafter(length=4), "self": SelfDrafter(target, 2, 3)}.get(
        kind, Reader(target, texts, tree=kind == "tree")
    )
    engine = Engine(target, drafter, "fixed:10", max_num_seqs=5, max_num_batched_tokens=24, prefix_tokens=64)
    rng, requests, records = random.Random(seed), {}, []
    engine.observers.append(records.append)
    joining = [*range(len(conversations))] * 2
    rng.shuffle(joining)
    leaving = set(rng.sample(range(len(joining)), 4))
    while joining or engine.has_work:
        while joining and rng.random() < 0.4:
            i = joining.pop()
            requests[engine.submit(conversations[i], params_of(i))] = i
        engine.step()
        assert_slots_owned(engine)
        for number, request in enumerate(requests):
            if number in leaving and len(request.generated) > 3:
                engine.cancel(request)
        assert_slots_owned(engine)
    for request, i in requests.items():
        if request.finish_reason == "length":
            assert request.generated == expected[i]
    assert sum(r.finish_reason == "length" for r in requests) >= 20
    assert sum(r.num_preempted for r in records) > 0
    assert sum(r.num_prefix_found for r in records) >= sum(r.num_prompt_found for r in requests) > 100
    assert target.num_free_slots == target.cache.limit


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_where_layers_see_a_window_the_texts_are_the_same(conversations, family):
    """What is found is longer than the window, ends inside it, and goes on in chunks shorter than it."""
    target = Target(plain_model(family), name=family)
    conversations = conversations[:7]
    expected = plainly(target, conversations)
    assert target.windows == {7} and min(map(len, conversations)) > 2 * 7
    later = [[*p, *t, 7, 11, i] for i, (p, t) in enumerate(zip(conversations, expected, strict=True))]
    after = plainly(target, later)
    records = []
    options = {"prefix_tokens": 1024, "max_num_seqs": 4, "max_num_batched_tokens": 9, "observers": [records.append]}
    engine = Engine(target, SelfDrafter(target, 2, 3), "fixed:3", **options)
    for prompts, known in ((conversations, expected), (later, after)):
        found = engine.generate(prompts, [params_of(i) for i in range(len(prompts))])
        assert [g.token_ids for g in found] == known
        assert_slots_owned(engine)
    assert sum(r.num_prefix_found for r in records) > 0.5 * sum(r.num_prefix_asked for r in records)
    assert 0 < sum(sum(r.accepted) for r in records) < sum(sum(r.verified) for r in records)
    assert_contents(engine)


def test_acceptance_is_that_of_reading_it_all():
    """The embedded DSpark drafter over a conversation of three turns."""
    target = load_target("tiny", dtype="float32", device="cpu")

    def conversation(**options):
        engine = Engine(target, load_drafter("dspark", target), "fixed:7", **options)
        turns, answers, found = [], [], []
        for turn in ("What is a river?", "Tom has 3 apples and buys 4 more. How many has he?", "And 5 more?"):
            turns.append({"role": "user", "content": turn})
            stream = engine.stream(list(turns), SamplingParams(temperature=1, seed=2, max_tokens=32))
            list(stream)
            answers.append(stream.generation)
            found.append(stream.request.num_prompt_found)
            turns.append({"role": "assistant", "content": answers[-1].text})
        return [(g.token_ids, g.rounds) for g in answers], found

    answers, found = conversation(prefix_tokens=4096)
    assert sum(found) > 60
    assert (answers, [0, 0, 0]) == conversation()
    assert sum(r.accepted for _, rounds in answers for r in rounds) > 20


# -- order and bookkeeping, without a model ------------------------------------------------------------------------------


class Desk:
    """Requests that are read at once, in a slot cache without tensors."""

    def __init__(self, limit=400, max_tokens=10 * RUN):
        self.cache = KVCache(limit)
        self.prefixes = PrefixCache(self.cache, max_tokens)
        self.num_requests = 0

    def begin(self, *runs: int, feature: float | None = None) -> Request:
        """A request whose tokens are these runs and one more; how much was found is its num_prompt_found."""
        tokens = [token for run in runs for token in [run] * RUN]
        self.num_requests += 1
        request = Request(self.num_requests, [*tokens, 0], SamplingParams(), len(tokens) + 1)
        self.prefixes.attach(request)
        request.num_prompt_found = request.num_cached
        if request.num_cached < len(tokens):
            self.cache.reserve(request.id, len(tokens) - request.num_cached)
        num_read, request.num_cached = len(tokens) - request.num_cached, len(tokens)
        if feature is not None:
            self.prefixes.note(request, FeaturePiece(torch.full((num_read, 3), feature), 0, num_read))
        self.prefixes.take_in(request)
        self.cache.check()
        return request

    def end(self, request: Request) -> None:
        self.prefixes.forget(request)
        self.cache.release(request.id)
        self.cache.check()

    def found(self, *runs: int) -> int:
        """How many of these runs are there; asking makes them the most recently used."""
        request = self.begin(*runs)
        self.end(request)
        return request.num_prompt_found // RUN


def test_the_least_recently_used_go_first_and_the_ends_before_their_beginnings():
    desk = Desk(max_tokens=4 * RUN)
    desk.end(desk.begin(1, 2, 3))
    desk.end(desk.begin(1, 8))  # 1 is used again
    assert desk.prefixes.num_spare == 4 * RUN
    desk.end(desk.begin(9))  # five: the end of the older chain goes
    assert [run.tokens[0] for run in desk.prefixes._idle] == [2, 8, 1, 9]
    desk.end(desk.begin(10))
    assert [run.tokens[0] for run in desk.prefixes._idle] == [8, 1, 9, 10]
    assert desk.found(1, 8) == 2
    assert [run.tokens[0] for run in desk.prefixes._idle] == [9, 10, 8, 1]


def test_what_is_in_use_stays_and_the_rest_gives_way_to_whoever_needs_slots():
    desk = Desk(limit=8 * RUN)
    running = desk.begin(1, 2)
    other = desk.begin(1, 2, 3)
    assert (running.num_prompt_found, other.num_prompt_found) == (0, 2 * RUN)
    assert desk.cache.num_free_slots == 5 * RUN  # three runs, two of them shared
    desk.end(other)
    desk.end(desk.begin(7, 8))
    assert desk.cache.num_free_slots == 6 * RUN
    desk.cache.reserve(99, 5 * RUN + 3)
    desk.cache.check()
    assert desk.prefixes.num_spare == 0
    assert desk.cache.num_free_slots == 6 * RUN - 5 * RUN - 3
    desk.end(running)
    desk.cache.release(99)
    assert desk.found(1, 2) == 2


def test_features_of_a_run_lie_where_those_of_one_that_was_dropped_lay():
    desk = Desk(max_tokens=4 * RUN)
    shelves = set()
    for number in range(200):
        desk.end(desk.begin(number, 1000 + number, feature=float(number)))
        found = desk.prefixes.attach(Request(-1, [number] * RUN + [1000 + number] * RUN + [0], SamplingParams(), 1))
        assert found.unique().tolist() == [number]
        shelves.update(run.features.untyped_storage().data_ptr() for run in desk.prefixes._idle)
        desk.end(Request(-1, [], SamplingParams(), 0))
        assert found.unique().tolist() == [number]
    assert len(shelves) == 1


def test_two_that_read_the_same_at_once_leave_it_once():
    desk = Desk()
    first, second = Request(901, [5] * RUN + [6], SamplingParams(), RUN + 1), None
    second = Request(902, list(first.tokens), SamplingParams(), RUN + 1)
    for request in (first, second):
        desk.prefixes.attach(request)
        desk.cache.reserve(request.id, RUN)
        request.num_cached = RUN
    for request in (first, second):
        desk.prefixes.take_in(request)
        desk.cache.check()
    assert desk.cache.num_free_slots == 400 - 2 * RUN
    desk.end(first)
    assert desk.prefixes.num_spare == 0
    desk.end(second)
    assert (desk.prefixes.num_spare, desk.cache.num_free_slots) == (RUN, 400)


def test_tokens_beyond_the_end_of_a_request_are_not_taken_in():
    desk = Desk()
    request = Request(901, [5] * (2 * RUN - 1), SamplingParams(), 4)
    desk.prefixes.attach(request)
    desk.cache.reserve(request.id, 2 * RUN)
    request.num_cached = 2 * RUN  # it stopped inside an accepted draft
    desk.prefixes.take_in(request)
    desk.end(request)
    assert desk.prefixes.num_spare == RUN


def test_a_step_that_raises_leaves_nothing_to_be_found(target):
    engine = Engine(target, prefix_tokens=1024)
    prompt = list(range(40))
    engine.submit(prompt, SamplingParams(max_tokens=8, seed=1))
    engine.step()
    verify, engine.rule.verify = engine.rule.verify, None
    with pytest.raises(TypeError):
        engine.step()
    engine.fail_running()
    engine.rule.verify = verify
    target.cache.check()
    assert target.num_free_slots == target.cache.limit
    assert engine.prefixes.num_spare == 2 * RUN  # what earlier steps had read
    assert_contents(engine)
    assert engine.generate([prompt], params_of(1))[0].token_ids == plainly(target, [[1], prompt])[1]


def test_a_second_prefix_cache_over_the_same_slots_retires_the_first(target, conversations, expected):
    first = Engine(target, prefix_tokens=4096)
    first.generate(conversations, params_of(0))
    assert first.prefixes.num_spare > 0
    second = Engine(target, prefix_tokens=4096)
    assert first.prefixes.num_spare == 0
    for engine in (second, first):
        all_params = [params_of(i) for i in range(len(conversations))]
        assert [g.token_ids for g in engine.generate(conversations, all_params)] == expected
        target.cache.check()
    assert (first.prefixes.num_spare, target.num_free_slots) == (0, target.cache.limit)
