"""The self-test passes on engines that keep the promise and fails on those that break it."""

from __future__ import annotations

import pytest

from dspark.engine.engine import Engine
from dspark.evaluate.lossless import LEAST_P, check_laws, check_tokens
from dspark.types import Draft, SamplingParams, Verdict
from dspark.verify import Coupled, Rejection
from engine.models import OracleDrafter, random_target

PROMPTS = [[3, 1, 4], [1, 5, 9], [2, 6]]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return random_target(tmp_path_factory.mktemp("target"))


def speculative(target, params, **options):
    """With a drafter that is sometimes right and sometimes wrong."""
    each = [SamplingParams(**{**params.__dict__, "seed": i}) for i in range(len(PROMPTS))]
    texts = [p + g.token_ids for p, g in zip(PROMPTS, Engine(target).generate(PROMPTS, each), strict=True)]
    return Engine(target, OracleDrafter(texts, error=0.4), "fixed:5", **options)


def accept_everything(draft: Draft, keep, verdict: Verdict) -> Verdict:
    return Verdict(keep.clone(), verdict.next_tokens)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_compared_with_plain_decoding(target, temperature, monkeypatch):
    params = SamplingParams(temperature=temperature, max_tokens=16, seed=0)
    engine = speculative(target, params)
    check = check_tokens(engine, Engine(target), PROMPTS, params, [1, 3], "float32")
    assert (check.num_texts, check.num_tokens, check.partings) == (6, 6 * 16, [])
    assert 0 < check.num_accepted < check.num_verified and check.tau > 1

    rule = Coupled.verify

    def careless(self, draft, keep, logits, requests):
        return accept_everything(draft, keep, rule(self, draft, keep, logits, requests))

    monkeypatch.setattr(Coupled, "verify", careless)
    broken = check_tokens(speculative(target, params), Engine(target), PROMPTS, params, [1, 3], "float32")
    assert broken.num_unexplained > 0
    parting = broken.partings[0]
    at = parting.difference.position
    assert parting.token_ids[:at] == parting.plain_token_ids[:at]
    assert parting.token_ids[at] != parting.plain_token_ids[at]
    assert broken.as_json()["unexplained"] == broken.num_unexplained


def test_laws_are_compared_by_sampling(target, monkeypatch):
    params = SamplingParams(temperature=1.0, seed=0)

    def p_value():
        engine = Engine(target, OracleDrafter([[3, 1, 4, *range(9)]], length=2), "fixed:2", rule="rejection")
        engine.drafter.propose = lambda requests, rule: sampled(engine, requests, rule)
        (check,) = check_laws(engine, Engine(target, rule="rejection"), [[3, 1, 4]], params, 300, 30)
        assert check.num_accepted > 0
        return check.test.p

    assert p_value() > LEAST_P
    rule = Rejection.verify

    def careless(self, draft, keep, logits, requests):
        return accept_everything(draft, keep, rule(self, draft, keep, logits, requests))

    monkeypatch.setattr(Rejection, "verify", careless)
    assert p_value() < LEAST_P


def sampled(engine, requests, rule):
    """One token each, drawn from a flat law."""
    import torch

    logits = torch.zeros(len(requests), engine.target.vocab_size)
    tokens, law = rule.draft(logits, requests, [[] for _ in requests])
    return Draft(tokens[:, None], torch.ones(len(requests), dtype=torch.long), probs=law[:, None])
