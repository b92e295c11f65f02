"""A loop that launches steps before it has read the ones before them writes what the plain loop writes, and loses no slot."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from dspark.drafters.loading import load_drafter
from dspark.drafters.ngram import NGramDrafter
from dspark.engine.engine import Engine
from dspark.errors import InvalidConfiguration
from dspark.target.loading import load_target
from dspark.target.target import Target
from dspark.types import Request, SamplingParams, StepRecord
from engine.models import VOCAB_SIZE, random_target
from engine.spies import interrupt
from target.tape import TapeRecorder


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return random_target(tmp_path_factory.mktemp("target"))


@pytest.fixture
def small(target: Target) -> Iterator[Target]:
    """The same, whose slots a test may make scarce."""
    limit = target.cache.limit
    yield target
    target.resize(limit)


class Watched:
    """An engine with the overlapped loop, and how many of its forwards read tokens that the host had not."""

    def __init__(self, target: Target, patch: pytest.MonkeyPatch, **options: Any) -> None:
        self.engine, self.num_ahead = Engine(target, overlap=True, **options), 0
        extend = target.extend

        def watched(spans: Any, feature_layers: Any = (), token_ids: Any = None) -> Any:
            self.num_ahead += token_ids is not None
            return extend(spans, feature_layers, token_ids)

        patch.setattr(target, "extend", watched)

    def step(self) -> StepRecord:
        """Nobody gets more than a token, and besides what was committed each request has one slot at most."""
        engine, cache = self.engine, self.engine.target.cache
        before = {r: len(r.tokens) for r in (*engine.batcher.running, *engine.batcher.waiting)}
        record = engine.step()
        assert all(len(r.tokens) <= before[r] + 1 and -1 not in r.tokens for r in before)
        cache.check()
        assert set(cache.request_ids) <= {r.id for r in engine.batcher.running}
        assert all(0 <= cache.length(r.id) - r.num_cached <= 1 for r in engine.batcher.running)
        return record


def random_requests(rng: random.Random) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of which many begin alike, and ends of all kinds; a few ask for what goes step by step."""
    system = [rng.randrange(VOCAB_SIZE) for _ in range(20)]
    prompts, all_params = [], []
    for i in range(12):
        tail = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 20))]
        prompts.append(system + tail if rng.random() < 0.4 else tail)
        settings: dict[str, Any] = rng.choice([dict(temperature=0.0), dict(temperature=0.7, top_k=9), dict(min_p=0.01)])
        settings |= rng.choice([{}] * 15 + [dict(repetition_penalty=1.3), dict(logprobs=2), dict(top_p=0.8)])
        stop = tuple(rng.sample(range(VOCAB_SIZE), rng.choice([0, 0, 3])))
        all_params.append(SamplingParams(**settings, max_tokens=rng.randint(1, 30), seed=i, stop_token_ids=stop))
    return prompts, all_params


@pytest.mark.parametrize("prefix_tokens", [0, 64])
@pytest.mark.parametrize("seed", range(2))
def test_whatever_happens_the_tokens_are_those_of_the_plain_loop(
    small: Target, monkeypatch: pytest.MonkeyPatch, seed: int, prefix_tokens: int
) -> None:
    rng = random.Random(seed)
    prompts, all_params = random_requests(rng)
    expected = Engine(small).generate(prompts, all_params)
    options = dict(max_num_seqs=4, max_num_batched_tokens=16, num_slots=84, prefix_tokens=prefix_tokens)
    records: list[StepRecord] = []
    watched = Watched(small, monkeypatch, **options, observers=[records.append])
    engine, requests = watched.engine, dict[int, Request]()
    joining = rng.sample(range(len(prompts)), len(prompts))
    leaving = set(joining[:2])
    while joining or engine.has_work:
        while joining and rng.random() < 0.12:
            i = joining.pop()
            requests[i] = engine.submit(prompts[i], all_params[i])
        if engine.has_work:
            watched.step()
        for i in leaving & requests.keys():
            if len(requests[i].generated) > 3:
                rng.choice([engine.cancel, engine.abandon])(requests[i])
        if rng.random() < 0.03:
            engine.set_aside()
        if rng.random() < 0.03 and engine.has_work:
            interrupt(engine, rng)
    for i, request in requests.items():
        found, known = engine.result(request), expected[i]
        num_found = len(found.token_ids)
        assert found.token_ids == known.token_ids[:num_found]
        assert (found.finish_reason, num_found) == (known.finish_reason, len(known.token_ids)) or i in leaving
        assert [x.token_id for x in found.logprobs or ()] == found.token_ids * (found.logprobs is not None)
    assert watched.num_ahead > 20 and sum(record.num_preempted for record in records) > 0
    assert small.num_free_slots == small.cache.limit


@pytest.mark.parametrize("is_recorded", [False, True])
def test_records_are_those_of_the_plain_loop(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, is_recorded: bool) -> None:
    """One per step, and it says of the step what the plain loop says; the last ones to end cost nobody a step."""
    target, records = random_target(tmp_path), [list[StepRecord](), list[StepRecord]()]
    if is_recorded:
        target.capture(TapeRecorder())
    prompts, params = [[3, 1, 4], [1, 5, 9], [2]], [SamplingParams(max_tokens=n, seed=n) for n in (5, 24, 16)]
    plain = Engine(target, observers=[records[0].append]).generate(prompts, params)
    watched = Watched(target, monkeypatch, observers=[records[1].append])
    assert [g.token_ids for g in watched.engine.generate(prompts, params)] == [g.token_ids for g in plain]
    kept = ("request_ids", "num_tokens", "num_context_tokens", "accepted", "num_running", "load")
    first, second = ([[getattr(r, name) for name in kept] for r in of] for of in records)
    for record in (*first, *second):
        record[0] = len(record[0])
    assert first == second and len(first) == 24
    assert watched.num_ahead == 22  # all but the prompt's, and the first to be launched ahead
    assert all({"target", "verify", "commit"} <= r.seconds.keys() for r in records[1])


@pytest.fixture(scope="module")
def tiny() -> Target:
    return load_target("tiny", dtype="float32", device="cpu", check=False)


@pytest.mark.parametrize(("length", "temperature"), [(7, 1.0), (3, 0.0)])
def test_drafts_that_are_read_late_change_nothing(
    tiny: Target, monkeypatch: pytest.MonkeyPatch, length: int, temperature: float
) -> None:
    rng = random.Random(length)
    prompts = [f"{asked} is a {noun}?" for asked in ("What", "Where") for noun in ("river", "cloud", "desert")]
    all_params = [
        SamplingParams(temperature, max_tokens=rng.randint(20, 40), seed=i, ignore_eos=True) for i in range(6)
    ]
    expected = [g.token_ids for g in Engine(tiny).generate(prompts, all_params)]
    drafter, records = load_drafter("dspark", tiny), list[StepRecord]()
    options = dict(max_num_seqs=3, max_num_batched_tokens=16, prefix_tokens=32, observers=[records.append])
    watched = Watched(tiny, monkeypatch, drafter=drafter, scheduler=f"fixed:{length}", **options)
    engine, joining, requests = watched.engine, list(zip(prompts, all_params, strict=True)), list[Request]()
    while joining or engine.has_work:
        while joining and rng.random() < 0.3:
            requests.append(engine.submit(*joining.pop(0)))
        if engine.has_work:
            engine.step()
            tiny.cache.check()
            assert all(tiny.cache.length(r.id) == r.num_cached for r in engine.batcher.running)
        if rng.random() < 0.05 and engine.has_work:
            interrupt(engine, rng)
    assert [r.generated for r in requests] == expected
    late = [r for r in records if r.num_asked and not r.num_prompt_tokens and set(r.verified) == {length}]
    assert watched.num_ahead > 5 and sum(sum(r.accepted) for r in late) > 5
    assert tiny.num_free_slots == tiny.cache.limit


def test_rounds_that_are_read_late_are_those_of_the_plain_loop(tiny: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a drafter that fails costs its requests their drafts."""
    params, found = [SamplingParams(0.7, max_tokens=n, seed=n, ignore_eos=True) for n in (20, 33)], []
    drafter = load_drafter("dspark", tiny)
    for overlap in (False, True):
        records = list[StepRecord]()
        engine = Engine(tiny, drafter, "fixed:7", overlap=overlap, observers=[records.append])
        made = engine.generate([[30, 31], [40, 41, 42]], params)
        told = [(r.drafted, r.verified, r.accepted, r.num_tokens, r.num_unread, r.load.base_tokens) for r in records]
        found.append(([(g.token_ids, g.rounds, g.is_drafted) for g in made], told))
    assert found[0] == found[1]
    request = engine.submit([30, 31], params[1])
    engine.step()
    monkeypatch.setattr(drafter, "propose", lambda *_: 1 / 0)
    while request.finish_reason is None:
        engine.step()
    assert len(request.generated) == 33 and sum(r.num_faults for r in records) == 1


def test_a_stop_string_ends_a_text_one_step_late_and_no_later(tiny: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["What drinks do you have?", "What kinds of coffee are there?"]
    whole = Engine(tiny).generate(prompts, SamplingParams(temperature=0, max_tokens=40))
    stops = [g.text[len(g.text) // 2 :][:3] for g in whole]
    params = [SamplingParams(temperature=0, max_tokens=40, stop=(stop,)) for stop in stops]
    expected = Engine(tiny).generate(prompts, params)
    watched = Watched(tiny, monkeypatch)
    found = watched.engine.generate(prompts, params)
    assert [(g.text, g.token_ids, g.finish_reason) for g in found] == [
        (g.text, g.token_ids, g.finish_reason) for g in expected
    ]
    assert {g.finish_reason for g in found} == {"stop"} and watched.num_ahead > 5
    streamed = list(watched.engine.stream(prompts[0], params[0]))
    assert "".join(delta.text for delta in streamed) == expected[0].text
    assert tiny.num_free_slots == tiny.cache.limit


def test_who_comes_waits_for_the_step_under_way_and_no_longer(target: Target) -> None:
    engine = Engine(target, overlap=True)
    first = engine.submit([3, 1, 4], SamplingParams(max_tokens=30, seed=0))
    for _ in range(5):
        engine.step()
    second = engine.submit([1, 5], SamplingParams(max_tokens=1, seed=0))
    for _ in range(2):
        engine.step()
    assert (len(first.generated), second.finish_reason) == (7, "length")
    engine.cancel(first)


def test_two_engines_of_one_target_take_turns(small: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one has under way, the other's need for slots may set aside."""
    params = SamplingParams(temperature=0.7, max_tokens=24, seed=1)
    prompts = [[3, 1, 4] * 4, [1, 5, 9] * 4]
    expected = [Engine(small).generate([p], params)[0].token_ids for p in prompts]
    small.resize(50)
    engines = [Watched(small, monkeypatch, max_length=40).engine for _ in prompts]
    requests = [engine.submit(prompt, params) for engine, prompt in zip(engines, prompts, strict=True)]
    while any(r.finish_reason is None for r in requests):
        for engine in engines:
            engine.step()
            small.cache.check()
    assert [r.generated for r in requests] == expected
    assert small.num_free_slots == 50


def test_what_cannot_go_ahead_is_refused(target: Target, tiny: Target) -> None:
    with pytest.raises(InvalidConfiguration, match="NGramDrafter with FixedLength"):
        Engine(target, NGramDrafter(), "fixed:3", overlap=True)
    with pytest.raises(InvalidConfiguration, match="BlockDrafter with Sparing"):
        Engine(tiny, load_drafter("dspark", tiny), overlap=True)
    with pytest.raises(InvalidConfiguration, match="needs rule='coupled'"):
        Engine(target, rule="rejection", overlap=True)
