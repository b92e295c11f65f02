"""The coupled rule's law: whatever is drafted, batched, chunked, preempted or cancelled, the text is that of plain decoding."""

from __future__ import annotations

import random

import pytest

from dspark.drafters.draft_model import DraftModelDrafter, SelfDrafter
from dspark.drafters.ngram import NGramDrafter
from dspark.drafters.tree import TreeDrafter
from dspark.engine.engine import Engine
from dspark.target.plan import View
from dspark.types import SamplingParams
from engine.models import VOCAB_SIZE, OracleDrafter, random_target, reference_logits

NUM_TOKENS = 24
SETTINGS = {
    "greedy": dict(temperature=0.0),
    "cool": dict(temperature=0.7),
    "plain law": dict(temperature=1.0),
    "cuts": dict(temperature=0.9, top_k=20, top_p=0.9, min_p=0.02),
    "penalties": dict(temperature=0.8, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3),
    "bias": dict(temperature=1.0, logit_bias={3: 2.0, 5: -4.0}),
    "late ends": dict(temperature=1.0, min_tokens=8, stop_token_ids=tuple(range(0, VOCAB_SIZE, 4))),
}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return random_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return random_target(tmp_path_factory.mktemp("small"), seed=1, num_layers=1)


@pytest.fixture(scope="module")
def prompts():
    rng = random.Random(0)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(n)] for n in (1, 2, 5, 9, 17, 30, 3, 12)]


@pytest.fixture(scope="module")
def plain(target, prompts):
    """What plain decoding says, one request at a time, computed once per setting."""
    cache: dict[str, list[list[int]]] = {}

    def lookup(name: str) -> list[list[int]]:
        if name not in cache:
            engine = Engine(target)
            cache[name] = [engine.generate([p], params_for(name, i))[0].token_ids for i, p in enumerate(prompts)]
        return cache[name]

    return lookup


def params_for(name: str, index: int) -> SamplingParams:
    return SamplingParams(**SETTINGS[name], max_tokens=NUM_TOKENS, seed=100 + index)


def make_drafter(name, target, small, texts):
    if name == "ngram":
        return NGramDrafter(length=4)
    if name == "draft model":
        return DraftModelDrafter(small, length=3)
    if name == "draft model's tree":
        return TreeDrafter(DraftModelDrafter(small, length=3), size=8, width=3)
    if name == "itself as draft model":
        return DraftModelDrafter(target.truncated(target.num_layers), length=3)
    if name == "self":
        return SelfDrafter(target, num_layers=2, length=3)
    if name == "sparse":
        return SelfDrafter(target, target.num_layers, length=3, view=View(2, 5))
    return OracleDrafter(texts, tree=name == "oracle tree")


def run(engine: Engine, prompts, all_params, rng: random.Random, num_cancelled: int = 0):
    """Requests join at random steps and some leave again; after every step each slot has exactly one owner."""
    target, joining = engine.target, list(range(len(prompts)))
    rng.shuffle(joining)
    leaving = set(joining[:num_cancelled])
    requests = {}
    while joining or engine.has_work:
        while joining and rng.random() < 0.5:
            i = joining.pop()
            requests[i] = engine.submit(prompts[i], all_params[i])
        engine.step()
        for i in leaving & requests.keys():
            if len(requests[i].generated) > 4:
                engine.cancel(requests[i])
        assert_slots_owned(engine)
    assert target.num_free_slots == target.cache.limit
    return {i: r for i, r in requests.items() if r.finish_reason != "cancelled"}


def assert_slots_owned(engine: Engine) -> None:
    cache = engine.target.cache
    cache.check()
    held = {r.id: r.num_cached for r in engine.batcher.running}
    assert {i: cache.length(i) for i in held} == held
    assert cache.num_free_slots == cache.limit - sum(held.values())


def test_history_matters(target, prompts):
    """The oracle of all tests here: a model that ignores its history would hide every cache bug."""
    changed = [(prompts[5][0] + 1) % VOCAB_SIZE, *prompts[5][1:]]
    before, after = reference_logits(target, prompts[5])[-1], reference_logits(target, changed)[-1]
    assert (before - after).abs().max() > 0.1 * before.std()


@pytest.mark.parametrize(
    "drafter", ["ngram", "draft model", "draft model's tree", "self", "sparse", "oracle chain", "oracle tree"]
)
@pytest.mark.parametrize("setting", SETTINGS)
def test_text_is_that_of_plain_decoding(drafter, setting, target, small, prompts, plain):
    expected = plain(setting)
    texts = [p + t for p, t in zip(prompts, expected, strict=True)]
    engine = Engine(target, make_drafter(drafter, target, small, texts), scheduler="fixed:10")
    all_params = [params_for(setting, i) for i in range(len(prompts))]
    generations = engine.generate(prompts, all_params)
    assert [g.token_ids for g in generations] == expected
    if "oracle" in drafter:
        assert (
            sum(r.accepted for g in generations for r in g.rounds) > 40
        )  # the draft was of use, or nothing was tested
    for g in generations:
        assert (
            1 + sum(r.accepted + 1 for r in g.rounds)
            >= len(g.token_ids)
            > 1 + sum(r.accepted + 1 for r in g.rounds[:-1])
        )


@pytest.mark.parametrize("drafter", ["none", "ngram", "draft model", "self", "sparse", "oracle chain", "oracle tree"])
@pytest.mark.parametrize("seed", range(3))
def test_joining_leaving_chunks_and_preemption_change_nothing(drafter, seed, target, small, prompts, plain):
    setting = ["plain law", "penalties", "greedy"][seed]
    expected = plain(setting)
    texts = [p + t for p, t in zip(prompts, expected, strict=True)]
    limit = target.cache.limit
    made = None if drafter == "none" else make_drafter(drafter, target, small, texts)
    engine = Engine(target, made, "fixed:10", max_num_seqs=5, max_num_batched_tokens=16, num_slots=90)
    preempted = []
    engine.observers.append(lambda record: preempted.append(record.num_preempted))
    all_params = [params_for(setting, i) for i in range(len(prompts))]
    try:
        finished = run(engine, prompts, all_params, random.Random(seed), num_cancelled=2)
        assert len(finished) == len(prompts) - 2
        for i, request in finished.items():
            assert request.generated == expected[i]
        if drafter in ("draft model",):
            assert made.model.num_free_slots == made.model.cache.limit
    finally:
        target.resize(limit)
    assert sum(preempted) > 0


def test_a_draft_model_equal_to_the_target_is_always_accepted(target, small, prompts, tmp_path):
    """Draft and target draw with the same noise, so equal laws give equal tokens: a cache hole would show here."""
    twin = random_target(tmp_path, seed=0)
    for temperature in (0.0, 1.0):
        engine = Engine(target, DraftModelDrafter(twin, length=4), "fixed:4")
        for g in engine.generate(prompts, SamplingParams(temperature=temperature, max_tokens=21, seed=3)):
            assert [r.accepted for r in g.rounds[:-1]] == [4] * (len(g.rounds) - 1)


@pytest.mark.parametrize("tree", [False, True])
def test_a_draft_model_without_room_for_all_drafts_for_those_that_fit(target, tmp_path, tree):
    """What the target's requests share, a draft model has to hold for each. When some have ended, the others' turn comes."""
    twin = random_target(tmp_path, seed=0)
    twin.resize(170)
    shared, records = list(range(48)), []
    drafter = DraftModelDrafter(twin, length=3, num_scratch=6 if tree else None)
    drafter = TreeDrafter(drafter, size=8, width=3) if tree else drafter
    engine = Engine(target, drafter, "fixed:8", num_slots=400, prefix_tokens=400, observers=[records.append])
    sizes = [10, 14, 18, 40, 60]
    params = [SamplingParams(temperature=0, max_tokens=n) for n in sizes]
    generations = engine.generate([[*shared, i] for i in range(5)], params)
    for i, generation in enumerate(generations):
        assert generation.token_ids == Engine(target).generate([[*shared, i]], params[i])[0].token_ids
    assert sum(r.num_faults for r in records) == 0
    drafted = [[r.drafted > 0 for r in g.rounds] for g in generations]
    assert all(drafted[0][:-1]) and not drafted[4][0] and drafted[4][-2]
    assert twin.num_free_slots == 170
    target.resize(65536)


@pytest.mark.parametrize("rule", ["coupled", "rejection"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("view", [None, View(2, 49), View(0, 51)])
def test_self_drafter_with_all_layers_that_sees_all_is_always_accepted(target, prompts, view, temperature, rule):
    engine = Engine(target, SelfDrafter(target, target.num_layers, length=4, view=view), "fixed:4", rule=rule)
    for g in engine.generate(prompts, SamplingParams(temperature=temperature, max_tokens=21, seed=3)):
        assert [r.accepted for r in g.rounds[:-1]] == [4] * (len(g.rounds) - 1)


def test_self_drafter_that_sees_less_is_sometimes_wrong(target, prompts):
    engine = Engine(target, SelfDrafter(target, target.num_layers, length=4, view=View(2, 40)), "fixed:4")
    accepted = [
        [r.accepted for r in g.rounds[:-1]]
        for g in engine.generate(prompts, SamplingParams(temperature=0, max_tokens=41))
    ]
    assert accepted[1] == [4] * len(accepted[1])  # all of it is in view
    assert sum(accepted[5]) < 4 * len(accepted[5])  # 71 tokens are not
