"""What a user of the engine relies on besides equality: endings, limits, log-probabilities, features, bad input."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from dspark.budget.prefix_scheduler import FixedLength
from dspark.drafters.draft_model import DraftModelDrafter, SelfDrafter
from dspark.drafters.loading import load_drafter
from dspark.drafters.ngram import NGramDrafter
from dspark.engine.engine import Engine
from dspark.errors import InvalidConfiguration, InvalidRequest
from dspark.monitor.judged import judged_tokens
from dspark.types import Draft, Load, SamplingParams
from engine.models import VOCAB_SIZE, OracleDrafter, random_target, reference_features, reference_logits


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return random_target(tmp_path_factory.mktemp("target"))


def plain(target, prompt, **settings):
    return Engine(target).generate([prompt], SamplingParams(**settings))[0]


def test_max_tokens_ends_within_a_draft(target):
    prompt = [3, 1, 4]
    expected = plain(target, prompt, temperature=0, max_tokens=30).token_ids
    drafter = OracleDrafter([prompt + expected], error=0.0)
    for n in (1, 2, 3, 7):
        generation = Engine(target, drafter, "fixed:5").generate([prompt], SamplingParams(temperature=0, max_tokens=n))[
            0
        ]
        assert generation.token_ids == expected[:n]
        assert generation.finish_reason == "length"
        assert len(generation.is_drafted) == n


def test_stop_token_inside_a_draft_drops_the_rest(target):
    prompt = [3, 1, 4]
    expected = plain(target, prompt, temperature=1, seed=5, max_tokens=30).token_ids
    stop = next(t for i, t in enumerate(expected) if i > 3 and t not in expected[:i])
    engine = Engine(target, OracleDrafter([prompt + expected], error=0.0), "fixed:5")
    generation = engine.generate(
        [prompt], SamplingParams(temperature=1, seed=5, max_tokens=30, stop_token_ids=(stop,))
    )[0]
    assert generation.token_ids == expected[: expected.index(stop) + 1]
    assert generation.finish_reason == "stop"
    assert target.num_free_slots == target.cache.limit


def test_context_limit_ends_a_request(tmp_path):
    target = random_target(tmp_path, context=32)
    for drafter in (None, NGramDrafter(), DraftModelDrafter(random_target(tmp_path, context=32))):
        generation = Engine(target, drafter).generate([list(range(20))], SamplingParams(temperature=0, max_tokens=100))[
            0
        ]
        assert (generation.finish_reason, 20 + len(generation.token_ids)) == ("length", 32)


def test_a_chosen_length_ends_a_request(target):
    engine = Engine(target, max_length=12)
    out = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=256, ignore_eos=True, seed=0))[0]
    assert (len(out.token_ids), out.finish_reason) == (9, "length")
    with pytest.raises(InvalidRequest, match="holds 12"):
        engine.prepare([1] * 12)
    with pytest.raises(InvalidConfiguration, match="max_length"):
        Engine(target, max_length=1)


def test_logprobs_are_the_targets_own(target):
    prompt = [3, 1, 4, 1, 5]
    settings = dict(temperature=0.7, top_k=5, seed=1, max_tokens=12, logprobs=3)
    expected = plain(target, prompt, **settings)
    engine = Engine(target, OracleDrafter([prompt + expected.token_ids], error=0.3))
    generation = engine.generate([prompt], SamplingParams(**settings))[0]
    assert generation.token_ids == expected.token_ids
    reference = reference_logits(target, prompt + generation.token_ids).log_softmax(-1)[len(prompt) - 1 : -1]
    for row, token, entry in zip(reference, generation.token_ids, generation.logprobs, strict=True):
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [t for t, _ in entry.top] == row.topk(3).indices.tolist()


class FeatureReader(OracleDrafter):
    """Checks what it is given, then drafts."""

    feature_layers = (0, 1)

    def __init__(self, target, texts, **options):
        super().__init__(texts, **options)
        self.target, self.seen, self.num_checked = target, {}, 0

    def propose(self, requests, rule):
        for r in requests:
            read = self.seen.setdefault(r.id, [])
            assert r.features_start == sum(map(len, read))
            read.append(r.features.clone())
            rows = torch.cat(read)
            assert len(rows) == r.num_cached == len(r.tokens) - 1
            expected = reference_features(self.target, r.tokens[:-1], self.feature_layers)
            assert (rows - expected).abs().max() < 1e-4
            self.num_checked += 1
        return super().propose(requests, rule)

    def release(self, request_id):
        self.seen.pop(request_id, None)


@pytest.mark.parametrize("tree", [False, True])
def test_features_equal_a_fresh_forward(target, tree):
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [7, 8], [5] * 20]
    params = SamplingParams(temperature=1, seed=2, max_tokens=15)
    texts = [p + g.token_ids for p, g in zip(prompts, Engine(target).generate(prompts, params), strict=True)]
    drafter = FeatureReader(target, texts, tree=tree)
    limit = target.cache.limit
    try:
        engine = Engine(target, drafter, "fixed:10", max_num_batched_tokens=12, num_slots=60)
        assert [p + g.token_ids for p, g in zip(prompts, engine.generate(prompts, params), strict=True)] == texts
    finally:
        target.resize(limit)
    assert drafter.num_checked > 10


def test_sampled_output_follows_the_law_under_the_rejection_rule(tmp_path):
    """Chi-square of the first three tokens, through the whole engine, against the law computed by plain forwards."""
    vocab_size, prompt, num_samples = 4, [1, 2, 3, 0, 2], 4000
    target = random_target(tmp_path / "target", seed=3, vocab_size=vocab_size)
    other = random_target(tmp_path / "draft", seed=4, num_layers=1, vocab_size=vocab_size)
    engine = Engine(target, DraftModelDrafter(other, length=2), "fixed:2", rule="rejection", max_num_seqs=64)
    params = [SamplingParams(temperature=1.3, max_tokens=3, seed=i) for i in range(num_samples)]
    generations = engine.generate([prompt] * num_samples, params)
    counts = Counter(tuple(g.token_ids) for g in generations)
    accepted = sum(r.accepted for g in generations for r in g.rounds) / sum(
        r.verified for g in generations for r in g.rounds
    )
    assert 0.2 < accepted < 0.95  # both branches of the rule were taken

    law = {}
    for tokens in product(range(vocab_size), repeat=3):
        probs = (reference_logits(target, prompt + list(tokens)) / 1.3).softmax(-1)
        law[tokens] = math.prod(float(probs[len(prompt) - 1 + i, t]) for i, t in enumerate(tokens))
    frequent = [t for t in law if law[t] * num_samples >= 5]
    observed = [counts[t] for t in frequent]
    expected = [law[t] * num_samples for t in frequent]
    observed.append(num_samples - sum(observed))
    expected.append(num_samples - sum(expected))
    assert chisquare(observed, expected).pvalue > 1e-3


def test_streaming_gives_what_generate_gives(target):
    prompt, params = [3, 1, 4], SamplingParams(temperature=1, seed=9, max_tokens=20)
    expected = Engine(target).generate([prompt], params)[0].token_ids
    engine = Engine(target, OracleDrafter([prompt + expected]), "fixed:5")
    stream = engine.stream(prompt, params)
    deltas = list(stream)
    assert [t for d in deltas for t in d.token_ids] == expected == stream.generation.token_ids
    assert any(len(d.token_ids) > 1 for d in deltas)
    assert [d.finish_reason for d in deltas][-1] == "length"


def test_rounds_of_trees_tell_how_deep_they_were_judged(target):
    """Whoever drafts errs at every third token; its decoys are right there now and then, and nothing continues them."""
    prompt, params, records = [3, 1, 4], SamplingParams(temperature=1, seed=9, max_tokens=200), []
    text = prompt + Engine(target).generate([prompt], params)[0].token_ids
    wrong = [[*text[:p], (text[p] + 1) % VOCAB_SIZE, *text[p + 1 :]] for p in range(5, len(text), 3)]
    engine = Engine(target, OracleDrafter(wrong, tree=True), "fixed:4", observers=[records.append])
    rounds = engine.generate([prompt], params)[0].rounds[:-1]
    judged = [[position for position, _, _ in judged_tokens(record)] for record in records[1:-1]]
    assert [r.reached for r in rounds] == [1 + max(positions, default=-1) for positions in judged]
    assert any(r.reached == r.accepted < r.verified // 2 for r in rounds) and any(
        r.reached > r.accepted for r in rounds
    )


def test_closing_a_stream_frees_everything(target):
    engine = Engine(target, NGramDrafter())
    stream = engine.stream([3, 1, 4], SamplingParams(max_tokens=50, seed=0))
    next(iter(stream))
    stream.close()
    assert stream.generation.finish_reason == "cancelled"
    assert not engine.has_work
    assert target.num_free_slots == target.cache.limit


def test_a_stream_goes_on_where_it_was_left(target):
    params = SamplingParams(temperature=1, seed=9, max_tokens=20)
    engine = Engine(target, NGramDrafter())
    stream = engine.stream([3, 1, 4], params)
    tokens = next(stream).token_ids + [t for d in stream for t in d.token_ids]
    assert tokens == Engine(target).generate([[3, 1, 4]], params)[0].token_ids
    assert list(stream) == []


def test_leaving_a_stream_early_cancels_it(target):
    engine = Engine(target, NGramDrafter())
    kept = engine.stream([3, 1, 4], SamplingParams(max_tokens=50, seed=0))
    for _ in kept:
        break
    for _ in engine.stream([1, 5, 9], SamplingParams(max_tokens=50, seed=0)):
        break
    engine.step()
    assert [r.id for r in engine.batcher.running] == [kept.request.id]
    kept.close()
    assert not engine.has_work and target.num_free_slots == target.cache.limit


def test_a_stream_that_nobody_has_read_is_cancelled_too(target):
    engine = Engine(target)
    engine.stream([3, 1, 4], SamplingParams(max_tokens=50, seed=0))
    engine.step()
    assert not engine.has_work and target.num_free_slots == target.cache.limit


def test_an_interrupted_stream_leaves_an_engine_that_works(target, monkeypatch):
    engine = Engine(target, NGramDrafter())
    extend, calls = target.extend, []

    def interrupted(*arguments):
        out = extend(*arguments)
        calls.append(out)
        if len(calls) == 3:
            raise KeyboardInterrupt  # read, and not yet written into the request
        return out

    monkeypatch.setattr(target, "extend", interrupted)
    params = SamplingParams(max_tokens=20, seed=0)
    stream = engine.stream([3, 1, 4], params)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    assert (
        engine.generate([[3, 1, 4]], params)[0].token_ids == Engine(target).generate([[3, 1, 4]], params)[0].token_ids
    )
    assert target.num_free_slots == target.cache.limit


@pytest.mark.parametrize("place", ["draft", "extend", "verify", "keep"])
def test_others_go_on_after_a_step_that_was_interrupted(target, place, monkeypatch):
    """Whatever the interrupted step had written for them is made anew."""
    params = SamplingParams(temperature=1, seed=9, max_tokens=30, logprobs=1)
    prompts = [[3, 1, 4], [1, 5, 9, 2], list(range(40))]
    expected = Engine(target).generate(prompts, params)
    engine = Engine(target, SelfDrafter(target, num_layers=2, length=3), "fixed:3", prefix_tokens=64)
    streams = [engine.stream(prompt, params) for prompt in prompts]
    for stream in streams:
        next(stream)
    owner = {"draft": engine.rule, "extend": target, "verify": engine.rule, "keep": target}[place]
    whole, num_left = getattr(owner, place), 2

    def interrupted(*arguments):
        nonlocal num_left
        num_left -= 1
        out = whole(*arguments)
        if num_left < 0:
            raise KeyboardInterrupt
        return out

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([[2, 7, 1]], params)
    for stream, known in zip(streams, expected, strict=True):
        for _ in stream:
            target.cache.check()
        found = stream.generation
        assert found.token_ids == known.token_ids and len(found.logprobs) == len(found.is_drafted) == 30
        assert 1 + sum(r.accepted + 1 for r in found.rounds[:-1]) < 30 <= 1 + sum(r.accepted + 1 for r in found.rounds)
    assert target.num_free_slots == target.cache.limit


def test_threads_take_turns(target):
    """Two threads with one engine, two with engines of their own over the same target."""
    params = SamplingParams(temperature=1, seed=9, max_tokens=30)
    prompts = [[3, 1, 4], [1, 5], [9, 2, 6, 5], [3, 5]]
    expected = [Engine(target).generate([p], params)[0].token_ids for p in prompts]
    shared = Engine(target, NGramDrafter())
    engines = [shared, shared, Engine(target, NGramDrafter()), Engine(target)]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda engine, prompt: engine.generate([prompt], params)[0].token_ids, engines, prompts)
    assert list(found) == expected
    assert target.num_free_slots == target.cache.limit


def test_objects_tell_what_they_are(target):
    engine = Engine(target, NGramDrafter(), "fixed:3")
    assert (
        repr(target).startswith("Target(") and "Qwen3ForCausalLM" in repr(target) and "float32 on cpu" in repr(target)
    )
    assert "NGramDrafter, FixedLength, Coupled; 0 requests running" in repr(engine)
    generation = engine.generate([[3, 1, 4]], SamplingParams(max_tokens=5, seed=0))[0]
    assert repr(generation) == "Generation(text='', finish_reason='length', seed=0)"
    stream = engine.stream([3, 1, 4], SamplingParams(max_tokens=5, seed=0))
    assert repr(stream) == "Stream(0 tokens so far, unfinished)"
    stream.close()
    assert pickle.loads(pickle.dumps(generation)) == generation


def test_names_are_not_objects(target):
    with pytest.raises(InvalidConfiguration, match=r"load_target\('tiny'\)"):
        Engine("tiny")
    with pytest.raises(InvalidConfiguration, match=r"load_drafter\('ngram', target\)"):
        Engine(target, "ngram")
    with pytest.raises(InvalidConfiguration, match=r"load_drafter\('ngram', load_target\('tiny'\)\)"):
        load_drafter("ngram", "tiny")
    with pytest.raises(InvalidConfiguration, match="'none' for plain decoding"):
        load_drafter(None, target)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"length": None}, "must be an integer, 0 or more; got None"),
        ({"length": -1}, "must be an integer, 0 or more; got -1"),
        ({"feature_layers": (3,)}, r"0 to 2 \(-1: its embeddings\), or \(\) for none; got \(3,\)"),
        ({"feature_layers": None}, "feature_layers of Odd must be layers"),
        ({"feature_layers": "1"}, "feature_layers of Odd must be layers"),
        ({"feature_layers": (1.0,)}, "feature_layers of Odd must be layers"),
    ],
)
def test_what_is_wrong_with_a_drafter_is_said_before_a_step(target, changes, why):
    with pytest.raises(InvalidConfiguration, match=why):
        Engine(target, odd(**changes))


def test_what_is_no_drafter_or_scheduler_is_refused(target):
    with pytest.raises(InvalidConfiguration, match=r"not its class: Engine\(target, NGramDrafter\(...\)\)"):
        Engine(target, NGramDrafter)
    with pytest.raises(InvalidConfiguration, match="is no drafter: it has no propose, release, length, feature_layers"):
        Engine(target, lambda target: NGramDrafter())
    for scheduler in (7, FixedLength, object()):
        with pytest.raises(InvalidConfiguration, match="a scheduler is a name or an object with"):
            Engine(target, NGramDrafter(), scheduler)


@pytest.mark.parametrize("layers", [[0, 1], np.array([0, 1])], ids=repr)
def test_layers_may_be_listed_in_any_way(target, layers):
    seen = []
    drafter = odd(feature_layers=layers, propose=lambda self, requests, rule: seen.append(requests[0].features))
    Engine(target, drafter, "fixed:2").generate([[3, 1, 4]], SamplingParams(temperature=0, max_tokens=3))
    assert torch.allclose(seen[0], reference_features(target, [3, 1, 4], (0, 1)), atol=1e-4)


@pytest.mark.parametrize(
    ("keep", "what"),
    [
        (None, "NoneType"),
        ([[True, True]], "list"),
        (torch.ones(1, 1, dtype=torch.bool), r"torch.bool \[1, 1\]"),
        (torch.ones(1, 2, dtype=torch.long), r"torch.int64 \[1, 2\]"),
    ],
)
def test_what_is_no_choice_of_draft_tokens_is_said(target, keep, what):
    class Odd(FixedLength):
        def choose(self, draft, survival, load):
            return keep

    drafter = odd(propose=lambda self, requests, rule: Draft(torch.tensor([[1, 2]]), torch.tensor([2])))
    engine = Engine(target, drafter, Odd(2))
    with pytest.raises(InvalidConfiguration, match=r"Odd.choose must give .*torch.bool \[1, 2\]; it gave " + what):
        engine.generate([[3, 1, 4]], SamplingParams(temperature=0, max_tokens=9))
    assert not engine.has_work and target.num_free_slots == target.cache.limit


def odd(**changes):
    """A drafter that is like none of ours in something."""
    given = {"length": 2, "feature_layers": (), "propose": lambda self, requests, rule: Draft.empty(len(requests))}
    return type("Odd", (), given | {"release": lambda self, request_id: None} | changes)()


def test_layers_of_another_target_draft_nothing(target, tmp_path, caplog):
    """A notebook's target was loaded again, and its drafter was not."""
    engine = Engine(target, SelfDrafter(random_target(tmp_path), 1, length=2), "fixed:2")
    [generation] = engine.generate([[3, 1, 4]], SamplingParams(temperature=0, max_tokens=6))
    assert generation.token_ids == plain(target, [3, 1, 4], temperature=0, max_tokens=6).token_ids
    assert "the engine has another target: load_drafter(name, target)" in caplog.text


def test_prompts_come_in_whatever_holds_them(target):
    settings = SamplingParams(temperature=0, max_tokens=4)
    expected = [plain(target, prompt, temperature=0, max_tokens=4).token_ids for prompt in ([1, 2], [3, 4])]
    for prompts in ((p for p in ([1, 2], [3, 4])), np.array([[1, 2], [3, 4]]), torch.tensor([[1, 2], [3, 4]])):
        assert [g.token_ids for g in Engine(target).generate(prompts, settings)] == expected
    assert Engine(target).generate(torch.tensor([1, 2]), settings)[0].token_ids == expected[0]


@pytest.mark.parametrize(
    "prompt", [np.array([1, 2]), torch.tensor([1, 2]), [np.int64(1), np.int16(2)], range(1, 3)], ids=repr
)
def test_one_prompt_comes_in_whatever_holds_it(target, prompt):
    settings = SamplingParams(temperature=0, max_tokens=4)
    expected = plain(target, [1, 2], temperature=0, max_tokens=4).token_ids
    engine = Engine(target)
    assert [t for delta in engine.stream(prompt, settings) for t in delta.token_ids] == expected
    assert [g.token_ids for g in engine.generate([prompt], settings)] == [expected]
    [generation] = engine.generate(prompt, settings)
    assert generation.token_ids == expected and {type(t) for t in generation.prompt_token_ids} == {int}


@pytest.mark.parametrize("prompts", [5, None, {"role": "user", "content": "hi"}])
def test_what_is_no_prompt_is_refused(target, prompts):
    with pytest.raises(InvalidRequest, match="prompts are a string"):
        Engine(target).generate(prompts)
    with pytest.raises(InvalidRequest, match="params must be SamplingParams"):
        Engine(target).generate([[1, 2]], {"temperature": 0})


@pytest.mark.parametrize("prompt", [[], "", [[]], [VOCAB_SIZE], [-1], list(range(60)) * 5])
def test_bad_prompts_are_refused_and_nothing_else_is_lost(target, prompt):
    engine = Engine(target)
    other = engine.submit([1, 2, 3], SamplingParams(max_tokens=4, seed=0))
    with pytest.raises(InvalidRequest):
        engine.submit(prompt)
    while other.finish_reason is None:
        engine.step()
    assert len(other.generated) == 4


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1.0},
        {"temperature": "0"},
        {"max_tokens": 2.5},
        {"max_tokens": "5"},
        {"top_k": 2.5},
        {"logprobs": True},
        {"seed": "x"},
        {"stop": 5},
        {"stop_token_ids": 5},
        {"stop_token_ids": ("a",)},
        {"logit_bias": None},
        {"logit_bias": {"a": 1}},
        {"logit_bias": {1: "a"}},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": math.nan},
        {"min_p": 1.5},
        {"top_k": -1},
        {"max_tokens": 0},
        {"repetition_penalty": 0.0},
        {"stop": ("",)},
        {"logit_bias": {1: math.nan}},
    ],
)
def test_bad_sampling_parameters_are_refused(settings):
    with pytest.raises(InvalidRequest, match=next(iter(settings))):
        SamplingParams(**settings)


class Anticipating:
    anticipates = True

    def choose(self, draft: Draft, survival: torch.Tensor, load: Load) -> torch.Tensor:
        return draft.real


def test_the_rejection_rule_refuses_an_anticipating_scheduler(target):
    Engine(target, scheduler=Anticipating(), rule="coupled")
    with pytest.raises(InvalidConfiguration, match="anticipate"):
        Engine(target, scheduler=Anticipating(), rule="rejection")


@pytest.mark.parametrize("name", ["fixed", "fixed:", "fixed:-1", "fixed:x", "threshold:nan", "auto?", ""])
def test_unknown_schedulers_are_refused(target, name):
    with pytest.raises(InvalidConfiguration, match="scheduler"):
        Engine(target, scheduler=name)


@pytest.mark.parametrize("rule", ["coupled", "rejection"])
def test_logits_that_are_no_numbers_hurt_their_request_alone(target, rule, monkeypatch):
    class Echo(NGramDrafter):
        def propose(self, requests, rule):
            return Draft(torch.tensor([r.tokens[-2:] for r in requests]), torch.full((len(requests),), 2))

    params = SamplingParams(temperature=1, top_p=0.9, seed=3, max_tokens=12)
    expected = Engine(target, Echo(), "fixed:2", rule).generate([[1, 5, 9]], params)[0].token_ids
    engine = Engine(target, Echo(), "fixed:2", rule)
    ill, well = engine.submit([3, 1, 4], params), engine.submit([1, 5, 9], params)
    engine.step()
    extend = target.extend

    def spoiled(spans, *more):
        out = extend(spans, *more)
        out.logits[: spans[0].num_logits] = math.nan
        return out

    with monkeypatch.context() as patch:
        patch.setattr(target, "extend", spoiled)
        engine.step()
    while engine.has_work:
        engine.step()
    assert well.generated == expected and len(ill.generated) == 12


@pytest.mark.parametrize("seed", [np.int32(-5), np.int64(-5), np.uint8(7)])
@pytest.mark.parametrize("rule", ["coupled", "rejection"])
def test_seeds_of_any_integer_type_are_the_same_seed(target, seed, rule):
    def text(seed):
        engine = Engine(target, NGramDrafter(), rule=rule)
        return engine.generate([[3, 1, 4]], SamplingParams(temperature=1, seed=seed, max_tokens=8))[0]

    assert text(seed) == text(int(seed))
    assert type(text(seed).seed) is int
