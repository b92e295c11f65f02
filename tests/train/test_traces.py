"""What drafters learn from is what the target thinks: features and teacher against a plain full forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PhiConfig,
    PhiForCausalLM,
)

from dspark.errors import UnsupportedModel
from dspark.train.texts import Text, pad
from dspark.train.traces import TargetStates

SHAPE = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def text(length: int, prompt_length: int = 2) -> Text:
    return Text.after_prompt(torch.randint(4, 300, (length,), dtype=torch.int32), prompt_length)


@torch.no_grad()
def test_features_and_teacher_equal_a_full_forward_of_each_text_alone(target_folder: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32).eval()
    texts = [text(n) for n in (5, 23, 11)]
    token_ids, _ = pad(texts)
    features, last_hidden = TargetStates(model, (-1, 0, 2))(token_ids)
    logits = model.lm_head(last_hidden)
    for row, own in enumerate(texts):
        n = len(own.token_ids)
        alone = model(own.token_ids[None].long(), output_hidden_states=True)
        wanted = torch.cat([alone.hidden_states[layer + 1][0] for layer in (-1, 0, 2)], -1)
        torch.testing.assert_close(features[row, :n], wanted, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(logits[row, :n], alone.logits[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "scale"),
    [
        (lambda: CohereForCausalLM(CohereConfig(**SHAPE)), 0.0625),
        (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=64)), 1.0),
    ],
)
def test_other_families_teach_their_own_law(make: Callable[[], Any], scale: float) -> None:
    torch.manual_seed(0)
    model = make().eval()
    token_ids = torch.randint(97, (2, 9))
    states = TargetStates(model, (-1, 1))
    features, last_hidden = states(token_ids)
    whole = model(token_ids, output_hidden_states=True)
    torch.testing.assert_close(model.get_output_embeddings()(last_hidden), whole.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(features, torch.cat([whole.hidden_states[i] for i in (0, 2)], -1), atol=1e-5, rtol=1e-4)
    assert states.scale == pytest.approx(scale, rel=1e-3)


@torch.no_grad()
def test_a_head_that_the_losses_do_not_know_is_refused() -> None:
    model = PhiForCausalLM(PhiConfig(**SHAPE)).eval()
    model.lm_head.bias.fill_(0.5)
    with pytest.raises(UnsupportedModel, match="LM head of PhiForCausalLM has a bias"):
        TargetStates(model, (0,))
    model.lm_head.bias.zero_()
    states = TargetStates(model, (0,))
    wrong = type("Output", (), {"last_hidden_state": torch.randn(1, 16, 32)})
    states.decoder = lambda **inputs: (states.caught.update({0: torch.zeros(1, 16, 32)}), wrong)[1]
    with pytest.raises(UnsupportedModel, match="are not its LM head over its last state"):
        states._measured_scale()
