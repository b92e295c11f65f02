"""What drafters learn from is what the target thinks: features and teacher against a plain full forward."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dspark.errors import InvalidConfiguration
from dspark.train.regenerate import Row, save_shard
from dspark.train.traces import TargetStates, Text, batches, pad, read_texts, split_validation


def text(length: int, prompt_length: int = 2) -> Text:
    return Text(torch.randint(4, 300, (length,), dtype=torch.int32), prompt_length)


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


def test_the_mask_marks_answers() -> None:
    token_ids, mask = pad([text(4, 1), text(6, 4)])
    assert mask.tolist() == [[False, True, True, True, False, False], [False, False, False, False, True, True]]
    assert token_ids.shape == (2, 6)


def test_shards_come_back_as_written_and_short_answers_do_not(tmp_path: Path) -> None:
    rows = [Row([5, 6, 7, 8, 9, 10], 2), Row([5, 6, 7], 1), Row([9] * 12, 3), Row([8] * 30, 18)]
    save_shard(rows[:2], tmp_path / "shard-0000.safetensors")
    save_shard(rows[2:], tmp_path / "shard-0001.safetensors")
    texts = read_texts(tmp_path, min_answer=4, max_length=20)
    assert [(t.token_ids.tolist(), t.prompt_length) for t in texts] == [([5, 6, 7, 8, 9, 10], 2), ([9] * 12, 3)]
    with pytest.raises(InvalidConfiguration, match="answers of at least 40 tokens"):
        read_texts(tmp_path, min_answer=40)
    with pytest.raises(InvalidConfiguration, match=r"dspark\.train\.regenerate"):
        read_texts(tmp_path / "nowhere")


def test_a_pass_has_every_text_once_within_the_budget() -> None:
    rng = random.Random(0)
    texts = [text(rng.randint(3, 60)) for _ in range(100)]
    made = list(batches(texts, 128, random.Random(1), pool=32))
    assert sorted(id(t) for batch in made for t in batch) == sorted(map(id, texts))
    assert all(len(b) == 1 or len(b) * max(len(t.token_ids) for t in b) <= 128 for b in made)
    assert [len(b) for b in made] != [len(b) for b in batches(texts, 128, random.Random(2), pool=32)]


def test_validation_texts_are_not_trained_on() -> None:
    texts = [text(5) for _ in range(30)]
    train, validation = split_validation(texts, 7)
    assert len(validation) == 7 and {*map(id, train), *map(id, validation)} == {*map(id, texts)} and len(train) == 23
