"""What drafters learn from is what the target thinks: features and teacher against a plain full forward."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from dspark.train.texts import Text, pad
from dspark.train.traces import TargetStates


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
