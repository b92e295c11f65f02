"""The shipped pair: exact with every drafter, and its drafters know what they were trained for.

Speculation hides a broken drafter: the text stays right and only acceptance drops. So acceptance has a floor here.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from dspark import Engine, SamplingParams, load_drafter, load_target

PROMPTS = [
    "A box holds 12 eggs. Lena buys 3 boxes and uses 7 eggs. How many eggs are left?",
    'What does "harbour" mean?',
    "Show me the `git` command to do this: List all branches",
    "Hi, can I get a small cappuccino please?",
    "Sam reads 14 pages a day for 5 days. How many pages does he read?",
    "Write a Python function `count_words` that does the following.\n\nReturn the number of words in text.",
]
# tau over these prompts at temperature 1, well below what the shipped weights reach and well above what a drafter with
# shifted positions, wrong features or wrong noise gets
LEAST_TAU = {"dspark": 2.0, "dflash": 1.75, "eagle3": 1.75, "draft": 1.5, "self": 1.15, "ngram": 1.1}


@pytest.fixture(scope="module")
def target():
    return load_target("tiny", dtype="float32", device="cpu")


def params(temperature: float, **settings) -> list[SamplingParams]:
    return [SamplingParams(temperature=temperature, seed=i, max_tokens=64, **settings) for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def plain(target):
    engine = Engine(target)
    return {
        "greedy": engine.generate(PROMPTS, params(0.0)),
        "sampled": engine.generate(PROMPTS, params(1.0)),
        "cut": engine.generate(PROMPTS, params(0.8, top_p=0.95, repetition_penalty=1.1)),
    }


@pytest.mark.parametrize("name", LEAST_TAU)
def test_drafters_are_exact_and_good(name, target, plain):
    engine = Engine(target, load_drafter(name, target), "fixed:7", max_num_seqs=4, max_num_batched_tokens=64)
    sampled = engine.generate(PROMPTS, params(1.0))
    assert [g.token_ids for g in sampled] == [g.token_ids for g in plain["sampled"]]
    assert [g.text for g in sampled] == [g.text for g in plain["sampled"]]
    greedy = engine.generate(PROMPTS, params(0.0))
    assert [g.token_ids for g in greedy] == [g.token_ids for g in plain["greedy"]]
    cut = engine.generate(PROMPTS, params(0.8, top_p=0.95, repetition_penalty=1.1))
    assert [g.token_ids for g in cut] == [g.token_ids for g in plain["cut"]]

    rounds = [r for g in sampled for r in g.rounds]
    assert sum(r.accepted + 1 for r in rounds) / len(rounds) > LEAST_TAU[name]
    assert target.num_free_slots == target.cache.limit


@pytest.mark.parametrize("name", ["dspark", "eagle3"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_tree_is_worth_more_than_the_chain_it_contains(name, temperature, target, plain):
    tau = []
    for shape in ({}, {"tree": 15}):
        engine = Engine(target, load_drafter(name, target, **shape), "fixed:15", max_num_seqs=4)
        generations = engine.generate(PROMPTS, params(temperature))
        assert [g.token_ids for g in generations] == [
            g.token_ids for g in plain["sampled" if temperature else "greedy"]
        ]
        rounds = [r for g in generations for r in g.rounds]
        tau.append(1 + sum(r.accepted for r in rounds) / len(rounds))
    assert tau[1] > 1.02 * tau[0]


def test_a_calibration_for_the_other_rule_is_said(target, caplog):
    drafter = load_drafter("dspark", target)
    for settings in ({}, {"scheduler": "fixed:7", "rule": "rejection"}):  # right, and heeded by nobody
        Engine(target, drafter, **settings)
    assert "calibrated for" not in caplog.text
    Engine(target, drafter, "algorithm1", rule="rejection")
    assert "calibrated for the coupled rule and this is the rejection rule" in caplog.text


def test_the_rejection_rule_accepts_about_as_much(target):
    """The same drafter under the paper's rule: its acceptance is the optimum, so it may not be far below."""
    engine = Engine(target, load_drafter("dspark", target), "fixed:7", rule="rejection")
    rounds = [r for g in engine.generate(PROMPTS, params(1.0)) for r in g.rounds]
    assert sum(r.accepted + 1 for r in rounds) / len(rounds) > LEAST_TAU["dspark"]


def test_a_threshold_verifies_less_and_changes_nothing(target, plain):
    engine = Engine(target, load_drafter("dspark", target), scheduler="threshold:0.5")
    generations = engine.generate(PROMPTS, params(1.0))
    assert [g.token_ids for g in generations] == [g.token_ids for g in plain["sampled"]]
    rounds = [r for g in generations for r in g.rounds]
    assert 0 < sum(r.verified for r in rounds) < 0.8 * sum(r.drafted for r in rounds)
    # what is left out was doubtful: of what is read, more is accepted than of whole blocks
    assert sum(r.accepted for r in rounds) > 0.45 * sum(r.verified for r in rounds)


def test_stop_strings_cut_the_text_not_the_tokens_before(target, plain):
    expected = plain["greedy"][0]
    word = expected.text[len(expected.text) // 2 :].split()[0]
    engine = Engine(target, load_drafter("dspark", target))
    generation = engine.generate([PROMPTS[0]], SamplingParams(temperature=0, max_tokens=64, stop=(word,)))[0]
    assert generation.finish_reason == "stop"
    assert generation.text == expected.text[: expected.text.index(word)]
    assert generation.token_ids == expected.token_ids[: len(generation.token_ids)]


def test_a_token_that_ends_the_output_is_in_the_text_whether_or_not_strings_are_watched_for(target, plain):
    expected = plain["greedy"][0]
    word = next(t for t in expected.token_ids[10:] if target.tokenizer.decode([t]).strip())
    params = SamplingParams(temperature=0, max_tokens=64, stop_token_ids=(word,))
    engine = Engine(target)
    unwatched, watched = (
        engine.generate([PROMPTS[0]], replace(params, stop=stop))[0] for stop in ((), ("never said",))
    )
    assert unwatched.token_ids == watched.token_ids
    assert watched.text == unwatched.text == target.tokenizer.decode(watched.token_ids, skip_special_tokens=True)
