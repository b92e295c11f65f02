"""An engine over replayed steps says what one over eager steps says."""

from __future__ import annotations

import random

import pytest

from dspark.engine.engine import Engine
from dspark.target.target import Target
from dspark.types import SamplingParams
from engine.models import VOCAB_SIZE, OracleDrafter, random_target
from target.tape import TapeRecorder


@pytest.fixture
def target(tmp_path):
    return random_target(tmp_path)


@pytest.mark.parametrize("tree", [False, True])
def test_same_tokens(target: Target, tree: bool) -> None:
    rng, tape = random.Random(0), TapeRecorder()
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(n)] for n in (1, 2, 5, 9, 17, 30)]
    params = [SamplingParams(temperature=0.8, max_tokens=24, seed=i) for i in range(len(prompts))]
    plain = [Engine(target).generate([p], one)[0].token_ids for p, one in zip(prompts, params, strict=True)]
    target.capture(tape)
    texts = [prompt + text for prompt, text in zip(prompts, plain, strict=True)]
    drafting = Engine(target, OracleDrafter(texts, tree=tree), "fixed:5", max_num_seqs=4)
    for engine in (Engine(target), drafting):
        found = engine.generate(prompts, params)
        assert [one.token_ids for one in found] == plain
    assert sum(round.accepted for one in found for round in one.rounds) > 40
    assert tape.num_replays > tape.num_recordings > 5
    target.cache.check()
