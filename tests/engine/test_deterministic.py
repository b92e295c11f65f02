"""A deterministic target in bfloat16: the same bits alone and in company, with and without drafts, so the same tokens."""

from __future__ import annotations

import random
import shutil

import pytest
import torch

from dspark.drafters.loading import load_drafter
from dspark.engine.engine import Engine
from dspark.target.loading import load_target
from dspark.types import SamplingParams

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
PROMPTS = [
    "What is 17 times 3? Explain each step, then check the result by adding.",
    "def add(a, b):",
    "Write a short letter to a friend about the weather in autumn.",
    "Tom has 12 apples and gives 5 away. How many are left?",
    "Hello!",
    "for i in range(10): print the square of i, one number per line, and then their sum in the last line",
    "Name three colours.",
    "Sort the list [3, 1, 2] and say how you did it.",
]


@pytest.fixture(scope="module")
def target():
    return load_target("tiny", dtype="bfloat16", device="cpu", deterministic=True)


class Witness:
    """Every row of logits that a target gives, by the tokens it has read up to there: each must have one value."""

    def __init__(self, target, monkeypatch):
        self.texts: dict[int, list[int]] = {}
        self.rows: dict[tuple[int, ...], torch.Tensor] = {}
        self.num_compared = self.num_differing = 0
        self.extend = target.extend
        monkeypatch.setattr(target, "extend", self)

    def __call__(self, spans, feature_layers=()):
        out = self.extend(spans, feature_layers)
        rows = iter(out.logits)
        for span in spans:
            text = [*self.texts.get(span.request_id, [])[: span.start], *span.tokens]
            self.texts[span.request_id] = text
            for end in range(len(text) - span.num_logits, len(text)):
                row, known = next(rows), self.rows.setdefault(tuple(text[: end + 1]), None)
                if known is None:
                    self.rows[tuple(text[: end + 1])] = row.clone()
                else:
                    self.num_compared += 1
                    self.num_differing += not torch.equal(row, known)
        return out


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_company_and_drafts_change_no_bit(target, temperature, monkeypatch):
    witness = Witness(target, monkeypatch)
    params = [SamplingParams(temperature=temperature, max_tokens=12, seed=i) for i in range(len(PROMPTS))]
    alone = [Engine(target).generate([p], [s])[0].token_ids for p, s in zip(PROMPTS, params, strict=True)]
    num_alone = witness.num_compared

    engine = Engine(target, load_drafter("dspark", target), "fixed:7", max_num_seqs=5, max_num_batched_tokens=40)
    dice, joining, requests = random.Random(0), list(range(len(PROMPTS))), {}
    while joining or engine.has_work:
        while joining and dice.random() < 0.5:
            i = joining.pop()
            requests[i] = engine.submit(PROMPTS[i], params[i])
        engine.step()
        if 3 in requests and len(requests[3].generated) > 4:
            engine.cancel(requests[3])
    assert all(request.generated == alone[i][: len(request.generated)] for i, request in requests.items())
    assert sum(r.accepted for request in requests.values() for r in request.rounds) > 20  # or nothing was tested
    assert witness.num_compared - num_alone > 40
    assert witness.num_differing == 0
