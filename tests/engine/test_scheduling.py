"""The engine under every scheduler: the text of plain decoding, requests without drafts, and drafters that fail."""

from __future__ import annotations

import logging
import math
import random
import time
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dspark.budget.calibration import Calibration
from dspark.budget.capacity import Capacity
from dspark.budget.guard import Guard, GuardSettings
from dspark.budget.hindsight import Hindsight
from dspark.engine import drafting
from dspark.engine.engine import Engine
from dspark.errors import InvalidConfiguration
from dspark.types import Draft, SamplingParams
from engine.models import VOCAB_SIZE, Known, OracleDrafter, random_target, reference_features

NAMES = ["fixed:3", "threshold:0.5", "algorithm1", "lagged", "optimal", "tokens-per-batch", "startup-table", "auto"]
PROMPTS = [[3, 1, 4, 1, 5, 9], [2, 7], [1] * 12, [8, 2, 8]]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return random_target(tmp_path_factory.mktemp("target"), context=1024)


@pytest.fixture(scope="module")
def texts(target):
    params = SamplingParams(temperature=1, seed=4, max_tokens=40)
    return [p + g.token_ids for p, g in zip(PROMPTS, Engine(target).generate(PROMPTS, params), strict=True)]


class Sure(OracleDrafter):
    """Says how sure it is."""

    def propose(self, requests, rule):
        draft = super().propose(requests, rule)
        draft.confidence = torch.full(draft.tokens.shape, 0.75)
        return draft


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_scheduler_writes_the_text_of_plain_decoding(target, texts, name, tree):
    for kind in (OracleDrafter, Sure):
        records = []
        options = {"max_num_seqs": 3, "observers": [records.append], "capacity": Known()}
        engine = Engine(target, kind(texts, tree=tree), name, **options)
        generations = engine.generate(PROMPTS, SamplingParams(temperature=1, seed=4, max_tokens=40))
        assert [p + g.token_ids for p, g in zip(PROMPTS, generations, strict=True)] == texts
        assert sum(sum(r.accepted) for r in records) > 10
        assert target.num_free_slots == target.cache.limit


@pytest.mark.parametrize("name", ["optimal", "startup-table"])
def test_schedulers_that_look_ahead_are_refused_under_the_rejection_rule(target, name):
    with pytest.raises(InvalidConfiguration, match="biases the rejection rule"):
        Engine(target, scheduler=name, rule="rejection")


def test_texts_are_the_same_where_choices_are_spared(target, texts):
    """And of the steps in between nothing is believed, nor learned of what was believed."""
    engine = Engine(target, Sure(texts, length=3), "auto", max_num_seqs=3, capacity=Known())
    sparing = engine.choosing.scheduler
    sparing._beside, sparing._spacing = [0.2, 0.5, 1.0, 0.9], 4  # as where choosing takes long
    engine.learners.remove(sparing)
    requests = [engine.submit(p, SamplingParams(temperature=1, seed=4, max_tokens=40)) for p in PROMPTS]
    records = []
    while any(r.finish_reason is None for r in requests):
        records.append(engine.step())
    assert [r.tokens for r in requests] == texts
    drafted = [r for r in records if any(r.drafted)]
    spared = [r for r in drafted if r.survival is None]
    assert len(spared) > len(drafted) / 2
    assert sum(sum(r.accepted) for r in spared) > 10
    assert engine.beliefs.summary()["classes"]["everyone"]["rounds"] < sum(len(r.drafted) for r in drafted) / 2


def test_auto_is_the_best_that_the_rule_allows(target):
    assert type(Engine(target, scheduler="auto").choosing.scheduler.scheduler).__name__ == "Optimal"
    assert type(Engine(target, scheduler="auto", rule="rejection").choosing.scheduler.scheduler).__name__ == "Lagged"


def test_records_tell_what_was_believed_and_what_came_of_it(target, texts):
    records = []
    engine = Engine(target, Sure(texts, error=0.0, length=3), "optimal", observers=[records.append])
    engine.generate(PROMPTS, SamplingParams(temperature=1, seed=4, max_tokens=40))
    drafted = [r for r in records if any(r.drafted)]
    for r in drafted:
        assert r.verified == r.kept.sum(1).tolist() and r.accepted == r.accepted_nodes.sum(1).tolist()
        assert not bool((r.accepted_nodes & ~r.kept).any())
        assert r.predicted_accepted == pytest.approx(float((r.survival * r.kept).sum()))
        assert r.num_tokens == r.load.base_tokens + sum(r.verified)
        assert r.num_asked == sum(1 for size in r.drafted) or r.num_asked < len(r.drafted)
    assert all(r.predicted_seconds > 0 for r in drafted[2:])
    assert all(r.step_seconds > 0 and r.draft_seconds > 0 for r in drafted)


class Never(Guard):
    """Drafts for nobody, or for one of several."""

    def __init__(self, engine_capacity, spared=0):
        super().__init__(engine_capacity)
        self.spared = spared

    def choose(self, request_ids, load, *told):
        self.reason = "test"
        return list(range(len(request_ids)))[: self.spared]


class Reader(OracleDrafter):
    """Wants features, checks every one of them, and counts those that it holds."""

    feature_layers = (0, 1)

    def __init__(self, target, texts, **options):
        super().__init__(texts, **options)
        self.target, self.rows, self.most_at_once = target, {}, 0

    def take(self, requests):
        for r in requests:
            have = self.rows.setdefault(r.id, [])
            assert r.features_start == sum(map(len, have))
            have.append(self.features_of(r).clone())
            self.most_at_once = max(self.most_at_once, len(have[-1]))
            assert sum(map(len, have)) == r.num_cached

    def features_of(self, request):
        assert not request.feature_pieces
        return request.features

    def propose(self, requests, rule):
        self.take(requests)
        return super().propose(requests, rule)

    def release(self, request_id):
        self.finished = self.rows.pop(request_id, None) or getattr(self, "finished", None)


class Separately(Reader):
    """Can read without drafting, as block drafters can."""

    def read(self, requests):
        self.take(requests)


class InPieces(Separately):
    """Takes features as they came, as block drafters do."""

    reads_pieces = True

    def features_of(self, request):
        joined = [] if request.features is None else [request.features]  # by the engine, to let go of steps
        return torch.cat([*joined, *(piece.cut for piece in request.feature_pieces)])


@pytest.mark.parametrize("kind", [Reader, Separately, InPieces])
def test_features_of_requests_without_drafts_are_bounded_and_complete(target, kind, monkeypatch):
    most = 32
    monkeypatch.setattr(drafting, "_MOST_UNREAD", most)
    prompt, params = [3, 1, 4, 1, 5], SamplingParams(temperature=0, max_tokens=2 * most + 20)
    expected = Engine(target).generate([prompt], params)[0].token_ids
    drafter = kind(target, [prompt + expected])
    engine, held = Engine(target, drafter, "fixed:3"), []
    engine.drafting.guard = Never(engine.capacity)
    request = engine.submit(prompt, params)
    while request.finish_reason is None:
        record = engine.step()
        held.append(request.num_cached - request.features_start)
        if request.finish_reason is None:
            read = sum(map(len, drafter.rows.get(request.id, [])))
            assert read == request.features_start  # none is lost
            assert not any(record.verified)
    assert request.generated == expected
    assert most <= max(held) <= most + 1 + drafter.length
    features = torch.cat(drafter.finished)
    reference = reference_features(target, (prompt + expected)[: len(features)], drafter.feature_layers)
    assert len(features) > most and (features - reference).abs().max() < 1e-3


def test_features_of_long_prompts_of_others_are_not_held_on_to(target, monkeypatch):
    """A request that decodes beside prompts needs one row of each step; it keeps the whole step only for as long as
    somebody else needs the rest of it, about.
    """
    few = 64
    monkeypatch.setattr(drafting, "_FEW_HELD", few)
    drafter = Reader(target, [[]])
    engine = Engine(target, drafter, "fixed:3")
    engine.drafting.guard, copied = Never(engine.capacity), []
    request = engine.submit([3, 1, 4], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
    others = deque(engine.submit([n] * 30, SamplingParams(temperature=0, max_tokens=2)) for n in range(2))
    while request.finish_reason is None:
        before = request.feature_pieces[:1]
        engine.step()
        if others[0].finish_reason is not None:
            others.popleft()
            others.append(engine.submit([5] * 30, SamplingParams(temperature=0, max_tokens=2)))
        if request.finish_reason is None:
            steps = engine.drafting._steps
            steps_held = [*(features for features, _ in steps), *(piece.features for piece in request.feature_pieces)]
            held = {id(features): len(features) for features in steps_held}
            own = sum(request in requests for _, requests in steps)
            assert own + sum(map(len, request.feature_pieces)) == request.num_cached
            assert sum(held.values()) < 4 * (request.num_cached + 60) + few + 62
            copied.append(bool(before) and request.feature_pieces[0] is not before[0])
    assert 0 < sum(copied) < 12
    for other in others:
        engine.cancel(other)


def test_features_that_somebody_needs_are_not_copied(target, texts, monkeypatch):
    """All of a step goes to requests that decode side by side, so nothing is to be had from cutting it up."""
    monkeypatch.setattr(drafting, "_FEW_HELD", 8)
    engine = Engine(target, Reader(target, texts), "fixed:3")
    engine.drafting.guard = Never(engine.capacity)
    requests = [engine.submit(p, SamplingParams(max_tokens=40, ignore_eos=True)) for p in PROMPTS]
    for _ in range(30):
        engine.step()
    assert all(len(r.feature_pieces) + len(engine.drafting._steps) == 30 for r in requests)
    for request in requests:
        engine.cancel(request)


def test_some_requests_may_be_left_out(target, texts):
    records = []
    engine = Engine(target, OracleDrafter(texts, error=0.0), "fixed:5", observers=[records.append])
    engine.drafting.guard = Never(engine.capacity, spared=2)
    generations = engine.generate(PROMPTS, SamplingParams(temperature=1, seed=4, max_tokens=40))
    assert [p + g.token_ids for p, g in zip(PROMPTS, generations, strict=True)] == texts
    full = [r for r in records if len(r.request_ids) == 4 and r.num_skipped]
    assert full and all(r.num_asked == 2 and r.num_skipped == 2 and r.skip_reason == "test" for r in full)
    assert all(r.drafted[2:] == [0, 0] for r in full)


class Useless(OracleDrafter):
    """Knows the text and says something else, sure of itself."""

    def propose(self, requests, rule):
        lengths = [len(r.tokens) for r in requests]
        known = [next(t for t in self.texts if t[:n] == r.tokens) for r, n in zip(requests, lengths, strict=True)]
        wrong = [
            [(token + 1) % VOCAB_SIZE for token in (t[n : n + 5] + [0] * 5)[:5]]
            for t, n in zip(known, lengths, strict=True)
        ]
        return Draft(torch.tensor(wrong), torch.full((len(requests),), 5), torch.full((len(requests), 5), 0.75))


def test_the_guard_ends_drafts_of_a_useless_drafter(target):
    """Nothing it says is ever accepted: after enough observations there are only rare probes."""
    records = []
    params = SamplingParams(temperature=0, max_tokens=160)
    known = [p + g.token_ids for p, g in zip(PROMPTS, Engine(target).generate(PROMPTS, params), strict=True)]
    engine = Engine(target, Useless(known), "auto", observers=[records.append], capacity=Known())
    engine.generate(PROMPTS, params)
    decoding = [r for r in records if r.request_ids and not r.num_prompt_tokens]
    early, late = decoding[:2], decoding[40:]
    assert any(any(r.drafted) for r in early)
    assert sum(r.num_asked for r in late) < 0.05 * sum(len(r.request_ids) for r in late)
    assert {r.skip_reason for r in late if r.num_skipped} == {"cost"}


class Broken(OracleDrafter):
    def __init__(self, texts, fault):
        super().__init__(texts)
        self.fault, self.calls, self.asked = fault, 0, []

    def propose(self, requests, rule):
        draft = super().propose(requests, rule)
        self.calls += 1
        self.asked.append([r.id for r in requests])
        if self.calls != 3:
            return draft
        num_requests, length = draft.tokens.shape
        sizes = torch.full((num_requests,), length)
        if self.fault == "raises":
            raise RuntimeError("no memory for a draft")
        garbage = {
            "tokens": Draft(draft.tokens + VOCAB_SIZE, sizes),
            "sizes": Draft(draft.tokens, sizes + 1),
            "confidence": Draft(draft.tokens, sizes, torch.full(draft.tokens.shape, torch.nan)),
            "parents": Draft(draft.tokens, sizes, parents=torch.full(draft.tokens.shape, 4)),
            "shape": Draft(draft.tokens[:1], sizes[:1]),
            "dtype": Draft(draft.tokens + 0.5, sizes),
            "probs": Draft(draft.tokens, sizes, probs=torch.ones(num_requests, length, VOCAB_SIZE + 1)),
            "law": Draft(draft.tokens, sizes, probs=torch.zeros(num_requests, length, VOCAB_SIZE)),
            "too long": Draft(draft.tokens.repeat(1, 2), 2 * sizes),
            "no draft": draft.tokens.tolist(),
        }
        return garbage[self.fault]


@pytest.mark.parametrize(
    "fault",
    ["raises", "tokens", "sizes", "confidence", "parents", "shape", "dtype", "probs", "law", "too long", "no draft"],
)
def test_requests_go_on_without_drafts_when_the_drafter_fails(target, texts, fault, caplog):
    drafter, records = Broken(texts, fault), []
    engine = Engine(target, drafter, "fixed:5", observers=[records.append], max_num_seqs=2)
    with caplog.at_level(logging.ERROR):
        generations = engine.generate(PROMPTS, SamplingParams(temperature=1, seed=4, max_tokens=40))
    assert [p + g.token_ids for p, g in zip(PROMPTS, generations, strict=True)] == texts
    assert sum(r.num_faults for r in records) == len(drafter.asked[2])
    assert not {*drafter.asked[2]} & {i for ids in drafter.asked[3:] for i in ids}
    assert len(drafter.asked) > 4  # the next requests were drafted for again
    assert len([r for r in caplog.records if "drafter failed" in r.message]) == 1
    assert target.num_free_slots == target.cache.limit


class Padded(OracleDrafter):
    """Leaves in padding what was there, and counts in 32 bits."""

    def propose(self, requests, rule):
        draft = super().propose(requests, rule)
        draft.tokens[~draft.real], draft.parents[~draft.real] = -100, 999
        return Draft(draft.tokens.int(), draft.sizes.int(), parents=draft.parents.int())


@pytest.mark.parametrize("scheduler", ["fixed:2", "threshold:0.1", "optimal", "tokens-per-batch"])
def test_what_lies_in_padding_means_nothing(target, texts, scheduler):
    records = []
    engine = Engine(target, Padded(texts, tree=True), scheduler, observers=[records.append], capacity=Known())
    generations = engine.generate(PROMPTS, SamplingParams(temperature=1, seed=4, max_tokens=40))
    assert [p + g.token_ids for p, g in zip(PROMPTS, generations, strict=True)] == texts
    assert sum(r.num_faults for r in records) == 0 < sum(sum(r.accepted) for r in records)


class Silent(OracleDrafter):
    """Has nothing to say, at some length."""

    def propose(self, requests, rule):
        num = len(requests)
        return Draft(torch.zeros(num, 0), torch.full((num,), 3), probs=torch.zeros(num, 0, VOCAB_SIZE + 1))


@pytest.mark.parametrize("rule", ["coupled", "rejection"])
def test_a_draft_of_no_tokens_is_none_whatever_is_beside_it(target, texts, rule):
    engine = Engine(target, Silent(texts), "algorithm1", rule)
    for generation in engine.generate(PROMPTS, SamplingParams(temperature=1, seed=4, max_tokens=5)):
        assert len(generation.token_ids) == 5
        assert {(r.drafted, r.verified) for r in generation.rounds} == {(0, 0)}


class CannotRead(Reader):
    def read(self, requests):
        raise RuntimeError("no memory for features")


def test_a_drafter_that_cannot_read_costs_drafts_and_no_answer(target, texts, monkeypatch):
    monkeypatch.setattr(drafting, "_MOST_UNREAD", 8)
    records = []
    engine = Engine(target, CannotRead(target, texts), "fixed:3", observers=[records.append])
    engine.drafting.guard = Never(engine.capacity)
    generations = engine.generate(PROMPTS, SamplingParams(temperature=1, seed=4, max_tokens=40))
    assert [p + g.token_ids for p, g in zip(PROMPTS, generations, strict=True)] == texts
    assert sum(r.num_faults for r in records) == len(PROMPTS)


@pytest.mark.parametrize("seed", range(10))
def test_a_clock_that_jumps_changes_no_text(target, texts, monkeypatch, seed):
    rng = random.Random(seed)
    jumping = lambda: time.perf_counter() + rng.choice([0, 0, 0, -3600, 3600])  # noqa: E731
    monkeypatch.setattr("dspark.engine.loop.time", SimpleNamespace(perf_counter=jumping))
    engine = Engine(target, Sure(texts), "auto", observers=[hindsight := Hindsight()])
    generations = engine.generate(PROMPTS, SamplingParams(temperature=1, seed=4, max_tokens=40))
    assert [p + g.token_ids for p, g in zip(PROMPTS, generations, strict=True)] == texts
    assert math.isfinite(hindsight.regret) and hindsight.line()
    seconds = engine.capacity.seconds(np.arange(1, 50), 1, 100)
    assert bool(np.isfinite(seconds).all()) and bool((seconds > 0).all())


def test_settings_are_of_use(target, texts):
    """With a bound that is never reached nobody is judged."""
    records = []
    engine = Engine(target, OracleDrafter(texts), "fixed:5", observers=[records.append])
    engine.guard = engine.drafting.guard = Guard(engine.capacity, GuardSettings(min_observations=10**9))
    engine.generate(PROMPTS, SamplingParams(temperature=1, seed=4, max_tokens=40))
    assert all(r.num_skipped == 0 for r in records)


def test_graphs_are_built_before_the_first_request_and_of_that_only_costs_are_learned(target, texts, monkeypatch):
    class Compiles(Sure):
        def __init__(self, *rest):
            super().__init__(*rest)
            self.num_compiled, self.sizes = 0, []

        def compile(self):
            self.num_compiled += 1

        def propose(self, requests, rule):
            self.sizes.append(len(requests))
            return super().propose(requests, rule)

    monkeypatch.setattr(target, "compile", lambda *layers, **options: True)
    drafter, records = Compiles(texts), []
    engine = Engine(target, drafter, "auto", compile=True, capacity=Capacity(), max_num_seqs=6)
    assert not engine.capacity.is_known  # what its drafts are worth is not known either
    drafter, drafter.calibration = Compiles(texts), Calibration((1.0,) * 5)
    options = dict(compile=True, capacity=Capacity(), observers=[records.append], max_num_seqs=6)
    engine = Engine(target, drafter, "auto", **options)
    assert drafter.num_compiled == 1 and {1, 6} <= set(drafter.sizes)
    assert engine.capacity.decoding.is_known and engine.capacity.drafting.is_known
    assert not records and not engine.guard._num_judged and target.num_free_slots == target.cache.limit
    engine.generate(PROMPTS, SamplingParams(seed=4, max_tokens=20))
    assert records and engine.guard._num_judged


def test_graphs_are_built_where_there_is_hardly_room(tmp_path, texts, monkeypatch):
    small = random_target(tmp_path, context=1024)
    monkeypatch.setattr(small, "compile", lambda *layers, **options: True)
    drafter = Sure(texts)
    drafter.compile = lambda: None
    engine = Engine(small, drafter, compile=True, num_slots=16, capacity=Capacity())
    assert engine.max_length < 17 and small.num_free_slots == small.cache.limit


def test_with_a_fixed_length_steps_are_foretold_for_those_who_watch_only(target, texts):
    def drafted(*observers):
        engine = Engine(target, Sure(texts), "fixed:3", capacity=Capacity(), observers=observers)
        request = engine.submit(PROMPTS[0], SamplingParams(temperature=1, seed=4, max_tokens=40))
        records = []
        while request.finish_reason is None:
            records.append(engine.step())
        assert request.tokens == texts[0]
        return [r for r in records if any(r.drafted)]

    alone, watched = drafted(), drafted(lambda record: None)
    assert [r.verified for r in alone] == [r.verified for r in watched] and len(alone) > 5
    assert all(r.survival is None and r.predicted_seconds == r.predicted_accepted == 0 for r in alone)
    assert all(r.survival is not None and r.predicted_accepted > 0 for r in watched)
    assert all(r.predicted_seconds > 0 for r in watched[1:])  # nothing is known of decoding at first


def test_where_drafts_do_not_pay_nobody_asks_what_steps_cost(target, texts):
    engine, records = Engine(target, Sure(texts), "auto", capacity=Capacity()), []
    engine.drafting.guard = Never(engine.capacity)
    request = engine.submit(PROMPTS[0], SamplingParams(temperature=1, seed=4, max_tokens=40))
    while request.finish_reason is None:
        records.append(engine.step())
    assert request.tokens == texts[0] and not any(any(r.drafted) or r.predicted_seconds for r in records)
    assert engine.capacity.decoding.num_observed == 0 and engine.capacity.is_known  # somebody has asked


def test_nothing_is_foretold_where_nobody_drafts(target):
    engine, records = Engine(target, capacity=Capacity()), []
    request = engine.submit(PROMPTS[0], SamplingParams(temperature=1, seed=4, max_tokens=20))
    while request.finish_reason is None:
        records.append(engine.step())
    assert not any(r.predicted_seconds for r in records) and engine.capacity.is_known
