"""Replayed acceptance has the stated rates, and is what the real engine then commits."""

from __future__ import annotations

import pytest
import torch

from benchmarks.replayed import Dice, ReplayedDrafter, ReplayedRule, rates_for, tau_of
from dspark.budget.capacity import Capacity
from dspark.drafters.ngram import NGramDrafter
from dspark.engine.engine import Engine
from dspark.types import Draft, Request, SamplingParams
from engine.models import random_target


@pytest.mark.parametrize(("tau", "length"), [(1.0, 7), (4.73, 7), (2.39, 4), (8.0, 7)])
def test_rates_have_the_stated_mean_length(tau, length):
    assert tau_of(rates_for(tau, length)) == pytest.approx(tau, abs=1e-6)


def test_a_mean_length_that_no_draft_reaches_is_refused():
    with pytest.raises(ValueError, match="1 to 8"):
        rates_for(8.5, 7)


def test_dice_keep_the_rates_and_confidences_mean_what_they_say():
    rates = [0.9, 0.8, 0.7, 0.85]
    dice = Dice(rates)
    assert 1 + dice.accepted.double().mean().item() == pytest.approx(tau_of(rates), abs=0.06)
    assert dice.confidences.mean(0).tolist() == pytest.approx(rates, abs=0.02)
    first, hit = dice.confidences[:, 0], dice.accepted >= 1
    for low, high in ((0.0, 0.85), (0.85, 0.95), (0.95, 1.0)):
        inside = (first >= low) & (first < high)
        assert hit[inside].double().mean().item() == pytest.approx(first[inside].mean().item(), abs=0.04)


class Always(NGramDrafter):
    """Proposes the same token over and over."""

    def propose(self, requests, rule):
        tokens = torch.ones(len(requests), self.length, dtype=torch.long)
        return Draft(tokens, torch.full((len(requests),), self.length))


def test_the_engine_commits_what_the_dice_say_under_every_policy(tmp_path):
    target, dice = random_target(tmp_path), Dice(rates_for(3.0, 5))
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, seed=3)
    for policy, most in (("fixed:5", 5), ("fixed:2", 2)):
        engine = Engine(target, ReplayedDrafter(Always(5), dice), policy, capacity=Capacity())
        engine.rule = ReplayedRule(engine.rule, dice)
        for prompt in ([4, 7, 9], [8, 7, 9]):
            generation, tokens = engine.generate([prompt], params)[0], [*prompt]
            tokens.append(generation.token_ids[0])
            for found in generation.rounds[:-1]:
                said = int(dice.num_accepted([Request(0, tokens, params, len(prompt), seed=3)])[0])
                assert found.accepted == min(said, most)
                tokens = [*prompt, *generation.token_ids[: len(tokens) - len(prompt) + found.accepted + 1]]
