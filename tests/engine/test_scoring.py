"""Log-probabilities of prompts, whatever else the engine does, and ends that may not come before their time."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from dspark import Engine, SamplingParams, load_drafter, load_target
from dspark.errors import InvalidRequest
from engine.models import VOCAB_SIZE, OracleDrafter, random_target, reference_logits

GREEDY = SamplingParams(temperature=0, max_tokens=6)
SCORED = SamplingParams(temperature=0, max_tokens=6, prompt_logprobs=2)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return random_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def prompts():
    rng = random.Random(0)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(n)] for n in (1, 2, 7, 20, 8, 3, 41)]


@pytest.mark.parametrize("chunk", [8, 512])
@pytest.mark.parametrize("prefix_tokens", [0, 512])
def test_scores_are_those_of_one_forward(target, prompts, chunk, prefix_tokens):
    engine = Engine(target, max_num_batched_tokens=chunk, prefix_tokens=prefix_tokens, max_num_seqs=3)
    alone = engine.generate(prompts, GREEDY)  # with a prefix cache, all of them are known afterwards
    scored = engine.generate(prompts, SCORED)
    for prompt, before, after in zip(prompts, alone, scored, strict=True):
        assert after.token_ids == before.token_ids
        assert before.prompt_logprobs is None
        expected = torch.log_softmax(reference_logits(target, prompt), -1)
        assert [p.token_id for p in after.prompt_logprobs] == prompt[1:]
        for row, entry in zip(expected, after.prompt_logprobs, strict=False):
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
            assert [t for t, _ in entry.top] == row.topk(2).indices.tolist()
    assert target.num_free_slots == target.cache.limit


def test_a_prompt_can_be_all_that_is_asked_about(target, prompts):
    engine = Engine(target)
    asked = [SamplingParams(max_tokens=0, prompt_logprobs=0), GREEDY]
    scored, other = engine.generate(prompts[2:4], asked)
    assert (scored.token_ids, scored.finish_reason, len(scored.prompt_logprobs)) == ([], "length", 6)
    assert other.token_ids == engine.generate(prompts[3], GREEDY)[0].token_ids
    with pytest.raises(InvalidRequest, match="max_tokens"):
        SamplingParams(max_tokens=0)


def test_who_waits_to_be_scored_can_leave_and_a_failure_is_his_alone(target, prompts, monkeypatch):
    engine = Engine(target)
    gone, stays = (engine.submit(prompt, SCORED) for prompt in prompts[2:4])
    engine.cancel(gone)
    while engine.has_work:
        engine.step()
    assert (gone.finish_reason, gone.prompt_logprobs, stays.finish_reason) == ("cancelled", [], "length")
    running = engine.submit(prompts[4], GREEDY)
    engine.step()
    failing, extend = engine.submit(prompts[2], SCORED), target.extend
    monkeypatch.setattr(target, "extend", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    assert engine.fail_running() == [failing]
    monkeypatch.setattr(target, "extend", extend)
    while engine.has_work:
        engine.step()
    assert running.generated == engine.generate(prompts[4], GREEDY)[0].token_ids
    assert target.num_free_slots == target.cache.limit


def test_scoring_waits_for_slots(target, prompts):
    engine = Engine(target, num_slots=60)
    try:
        running = engine.submit(prompts[3], SamplingParams(temperature=0, max_tokens=30))
        engine.step()
        scored = engine.submit(prompts[6], SamplingParams(max_tokens=0, prompt_logprobs=0))
        engine.step()
        assert scored.finish_reason is None
        while engine.has_work:
            engine.step()
        assert (running.finish_reason, scored.finish_reason) == ("length", "length")
    finally:
        target.resize(65536)


def test_a_prompt_is_scored_chunk_by_chunk_beside_others_and_read_once(target, prompts, monkeypatch):
    engine, extend, read = Engine(target, max_num_batched_tokens=8), target.extend, []
    running = engine.submit(prompts[2], SamplingParams(temperature=0, max_tokens=20))
    engine.step()
    scored = engine.submit(prompts[6], SCORED)

    def reading(spans, *others, **more):
        read.append({span.request_id: len(span.tokens) for span in spans})
        return extend(spans, *others, **more)

    monkeypatch.setattr(target, "extend", reading)
    for num_steps in range(1, 7):
        engine.step()
        assert len(running.generated) == num_steps + 1  # nobody waits for more than a chunk
    assert max(sum(each.values()) for each in read) <= 8
    assert sum(each.get(scored.id, 0) for each in read) == len(prompts[6]) + len(scored.generated) - 1
    while engine.has_work:
        engine.step()
    assert scored.generated == engine.generate(prompts[6], GREEDY)[0].token_ids


def test_who_decodes_gets_slots_before_who_is_scored(target, prompts):
    engine = Engine(target, num_slots=60, max_num_batched_tokens=2)
    try:
        running = engine.submit(prompts[4], SamplingParams(temperature=0, max_tokens=40))
        scored, was_under_way = engine.submit(prompts[6], SCORED), []
        while engine.has_work:
            assert not engine.step().num_preempted
            was_under_way.append(engine.scoring.is_under_way)
            assert running.finish_reason or scored.finish_reason is None
        began_anew = [a and not b for a, b in pairwise(was_under_way)]
        assert sum(began_anew) == 2  # once it was set aside, and once it was done
        expected = Engine(target).generate(prompts[6], SCORED)[0]
        assert [p.token_id for p in scored.prompt_logprobs] == prompts[6][1:]
        assert scored.generated == expected.token_ids
        assert target.num_free_slots == target.cache.limit
    finally:
        target.resize(65536)


def test_a_fault_of_who_runs_leaves_who_is_scored(target, prompts, monkeypatch):
    engine = Engine(target, max_num_batched_tokens=8)
    running = engine.submit(prompts[2], GREEDY)
    engine.step()
    scored = engine.submit(prompts[6], SCORED)
    engine.step()
    with monkeypatch.context() as broken:
        broken.setattr(engine.rule, "verify", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert engine.fail_running() == [running]
    while engine.has_work:
        engine.step()
    assert (
        scored.prompt_logprobs
        == Engine(target, max_num_batched_tokens=8).generate(prompts[6], SCORED)[0].prompt_logprobs
    )
    assert target.num_free_slots == target.cache.limit


def test_drafters_know_a_prompt_that_was_scored():
    target = load_target("tiny", dtype="float32", device="cpu")
    for prefix_tokens in (0, 512):
        engine = Engine(target, load_drafter("dspark", target), "fixed:7", prefix_tokens=prefix_tokens)
        (plain,) = engine.generate("What is a river?", SamplingParams(temperature=0, max_tokens=24))
        for _ in range(2):
            (scored,) = engine.generate(
                "What is a river?", SamplingParams(temperature=0, max_tokens=24, prompt_logprobs=0)
            )
            assert (scored.token_ids, scored.rounds) == (plain.token_ids, plain.rounds)


def test_nothing_ends_a_text_before_min_tokens(target, prompts):
    ends = tuple(range(0, VOCAB_SIZE, 3))
    for seed, prompt in enumerate(prompts):
        params = SamplingParams(seed=seed, min_tokens=9, max_tokens=30, stop_token_ids=ends)
        (plain,) = Engine(target).generate(prompt, params)
        assert len(plain.token_ids) > 9 and not set(plain.token_ids[:9]) & set(ends)
        drafter = OracleDrafter([prompt + plain.token_ids], error=0.2)
        assert Engine(target, drafter, "fixed:5").generate(prompt, params)[0].token_ids == plain.token_ids
    free = SamplingParams(seed=0, max_tokens=30, stop_token_ids=ends)
    assert min(len(Engine(target).generate(p, free)[0].token_ids) for p in prompts) < 9  # it would have ended


class Letter:
    """A grammar: token 5 three times, and then one of the ends."""

    text, fault = "", None

    def __init__(self, ends):
        self._ends = ends

    def matcher(self):
        return self

    def allowed(self, tokens):
        mask = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
        mask[[5] if len(tokens) < 3 else self._ends] = True
        return mask


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_grammar_that_allows_only_the_end_comes_before_min_tokens(target, prompts, temperature):
    params = SamplingParams(
        temperature=temperature, min_tokens=9, stop_token_ids=(1, 2), grammar=Letter([1, 2]), seed=0
    )
    for drafter in (None, OracleDrafter([prompts[2] + [5] * 9], error=0)):
        (written,) = Engine(target, drafter, "fixed:5").generate(prompts[2], params)
        assert written.token_ids[:3] == [5] * 3 and written.token_ids[3:] in ([1], [2])
        assert written.finish_reason == "stop"


def test_stop_strings_wait_for_min_tokens_too():
    engine = Engine(load_target("tiny", dtype="float32", device="cpu"))
    ask = dict(temperature=0, max_tokens=24, ignore_eos=True)
    (free,) = engine.generate("What is a river?", SamplingParams(**ask))
    stop = free.text.split()[1]
    (stopped,) = engine.generate("What is a river?", SamplingParams(**ask, stop=(stop,)))
    (late,) = engine.generate("What is a river?", SamplingParams(**ask, stop=(stop,), min_tokens=16))
    assert stopped.finish_reason == "stop" and len(stopped.token_ids) < 16
    assert len(late.token_ids) > 16 and late.text.startswith(free.text[: len(stopped.text) + len(stop)])
