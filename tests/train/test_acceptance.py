"""tau from finished text is tau of decoding: the same noise gives the same rounds in the engine, one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import dspark
from dspark.noise import COUPLED, gumbel
from dspark.target.target import Target
from dspark.train.acceptance import Outcome, load_guesser, walk
from dspark.train.texts import Text

PAIR = Path(__file__).parents[2] / "pairs" / "tiny"
QUESTIONS = ["What is a river?", "Tom has 3 apples and buys 4 more. How many has he?", "Write a function that adds."]
LENGTH = 48


@pytest.fixture(scope="module")
def target() -> Target:
    return dspark.load_target("tiny", dtype="float32", device="cpu")


@pytest.mark.parametrize("name", ["dspark", "dflash", "draft"])
def test_every_round_is_the_engines(name: str, target: Target) -> None:
    engine = dspark.Engine(target, dspark.load_drafter(name, target, length=7))
    prompts = [[{"role": "user", "content": question}] for question in QUESTIONS]
    decoded = [
        engine.generate([prompt], dspark.SamplingParams(max_tokens=LENGTH, seed=seed))[0]
        for seed, prompt in enumerate(prompts)
    ]
    plain = AutoModelForCausalLM.from_pretrained(PAIR / "target", dtype=torch.float32).eval()
    guesser = load_guesser(PAIR / name, plain, torch.float32, block_size=7)
    texts = [
        Text.after_prompt(torch.tensor(g.prompt_token_ids + g.token_ids, dtype=torch.int32), len(g.prompt_token_ids))
        for g in decoded
    ]
    noise = torch.stack(
        [gumbel(g.seed, len(g.prompt_token_ids), LENGTH + 8, 4096, COUPLED, torch.device("cpu")) for g in decoded]
    )
    matched = guesser.matches(texts, noise)
    for row, generation in enumerate(decoded):
        walked = walk(matched[row], len(generation.token_ids))
        accepted = [r.accepted for r in generation.rounds]
        assert walked[:-1] == accepted[:-1]
        # the engine leaves room for the bonus token under max_tokens, and the walk does not
        assert walked[-1] - accepted[-1] in ((0,) if generation.finish_reason == "stop" else (0, 1))
    assert {generation.finish_reason for generation in decoded} == {"stop", "length"}
    assert sum(r.accepted for g in decoded for r in g.rounds) > 10, "no draft was ever right: nothing was tested"


def test_walking_from_round_to_round() -> None:
    right = torch.tensor([[1, 1], [0, 1], [0, 0], [1, 0], [1, 1], [1, 1], [0, 0]]).bool()
    assert walk(right, 7) == [2, 1, 1]  # 0 -> 3 -> 5 -> the end, which cuts the last one
    assert walk(right, 1) == []


def test_tau_and_its_error() -> None:
    outcome = Outcome([[2, 0], [1, 1]], block_size=2)
    assert outcome.tau == 2.0 and outcome.acceptance == [0.75, pytest.approx(1 / 3)]
    assert outcome.standard_error == 0.0  # both prompts have tau 2
    assert Outcome([[2], [0]], 2).standard_error == pytest.approx(1.0)
