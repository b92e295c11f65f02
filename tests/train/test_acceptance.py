"""tau from finished text is tau of decoding: the same noise gives the same rounds in the engine, one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import dspark
from dspark.checkpoints import save_drafter
from dspark.drafters.eagle3_model import Eagle3Config, Eagle3Model
from dspark.noise import COUPLED, gumbel
from dspark.target.target import Target
from dspark.train.acceptance import Guesser, Outcome, decode, load_guesser, walk
from dspark.train.kinds import shape_of
from dspark.train.texts import Text
from dspark.verify import RULES

PAIR = Path(__file__).parents[2] / "pairs" / "tiny"
QUESTIONS = ["What is a river?", "Tom has 3 apples and buys 4 more. How many has he?", "Write a function that adds."]
LENGTH = 48


@pytest.fixture(scope="module")
def target() -> Target:
    return dspark.load_target("tiny", dtype="float32", device="cpu")


@pytest.mark.parametrize("name", ["dspark", "dflash", "eagle3", "draft"])
def test_every_round_is_the_engines(name: str, target: Target) -> None:
    prompts = [[{"role": "user", "content": question}] for question in QUESTIONS]
    plain = AutoModelForCausalLM.from_pretrained(PAIR / "target", dtype=torch.float32).eval()
    guesser = load_guesser(PAIR / name, plain, torch.float32, block_size=7)
    decoded = _agree(target, dspark.load_drafter(name, target, length=7), guesser, prompts, 4096)
    assert {generation.finish_reason for generation in decoded} == {"stop", "length"}


@pytest.mark.parametrize("draft_vocab_size", [None, 200])
def test_so_are_those_of_eagle3(draft_vocab_size: int | None, target_folder: Path, tmp_path: Path) -> None:
    """Random weights are right now and then, because target and drafter draw with the same noise."""
    target = dspark.load_target(target_folder, dtype="float32", device="cpu")
    plain = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32).eval()
    shape = shape_of(plain.config) | {"draft_vocab_size": draft_vocab_size}
    torch.manual_seed(0)
    model = Eagle3Model(Eagle3Config.from_dict({**shape, "target_layer_ids": [0, 1, 2], "ttt_length": 7}))
    if draft_vocab_size is not None:
        model.choose_vocabulary(torch.randperm(300)[:draft_vocab_size])
    save_drafter(model, tmp_path)
    guesser = load_guesser(tmp_path, plain, torch.float32, block_size=7)
    _agree(target, dspark.load_drafter(tmp_path, target), guesser, [list(range(i, i + 3)) for i in range(10, 16)], 300)


def test_the_papers_rule_accepts_more(target: Target) -> None:
    """1 less the total variation, where noise that is shared reaches that over 1 plus it at least."""
    drafter = dspark.load_drafter("dspark", target)
    prompts = [target.tokenizer.encode(question) for question in QUESTIONS] * 8
    tau = {rule: decode(dspark.Engine(target, drafter, "fixed:7", rule), prompts, 64).tau for rule in RULES}
    assert 1.5 < tau["coupled"] < tau["rejection"] < 8


def _agree(target: Target, drafter: Any, guesser: Guesser, prompts: list[Any], vocab_size: int) -> list[Any]:
    """Decodes each prompt, and compares its rounds with those found in the finished text."""
    engine = dspark.Engine(target, drafter, f"fixed:{drafter.length}")
    decoded = [
        engine.generate([prompt], dspark.SamplingParams(max_tokens=LENGTH, seed=seed))[0]
        for seed, prompt in enumerate(prompts)
    ]
    texts = [
        Text.after_prompt(torch.tensor(g.prompt_token_ids + g.token_ids, dtype=torch.int32), len(g.prompt_token_ids))
        for g in decoded
    ]
    noise = torch.stack(
        [gumbel(g.seed, len(g.prompt_token_ids), LENGTH + 8, vocab_size, COUPLED, torch.device("cpu")) for g in decoded]
    )
    matched = guesser.matches(texts, noise)
    for row, generation in enumerate(decoded):
        walked = walk(matched[row], len(generation.token_ids))
        accepted = [r.accepted for r in generation.rounds]
        assert walked[:-1] == accepted[:-1] and len(walked) == len(accepted)
        # the engine leaves room for the bonus token under max_tokens, and the walk does not
        if not accepted:  # the answer ended at once
            continue
        assert walked[-1] - accepted[-1] in ((0,) if generation.finish_reason == "stop" else (0, 1))
    assert sum(r.accepted for g in decoded for r in g.rounds) > 10, "no draft was ever right: nothing was tested"
    return decoded


def test_walking_from_round_to_round() -> None:
    right = torch.tensor([[1, 1], [0, 1], [0, 0], [1, 0], [1, 1], [1, 1], [0, 0]]).bool()
    assert walk(right, 7) == [2, 1, 1]  # 0 -> 3 -> 5 -> the end, which cuts the last one
    assert walk(right, 1) == []


def test_tau_and_its_error() -> None:
    outcome = Outcome([[2, 0], [1, 1]], block_size=2)
    assert outcome.tau == 2.0 and outcome.acceptance == [0.75, pytest.approx(1 / 3)]
    assert outcome.standard_error == 0.0  # both prompts have tau 2
    assert Outcome([[2], [0]], 2).standard_error == pytest.approx(1.0)
