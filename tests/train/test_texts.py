"""Texts on disk and in batches: masks, what is too short, and everything exactly once."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from dspark.errors import InvalidConfiguration
from dspark.train.regenerate import Row, save_shard
from dspark.train.texts import Text, TextsInfo, batches, pad, read_infos, read_texts, save_texts, split_validation


def text(length: int, prompt_length: int = 2) -> Text:
    return Text.after_prompt(torch.randint(4, 300, (length,), dtype=torch.int32), prompt_length)


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
    with pytest.raises(InvalidConfiguration, match="dspark data prepare"):
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


def test_masks_with_holes_survive_the_shard(tmp_path: Path) -> None:
    mask = torch.tensor([False, True, True, False, False, True, True])
    save_texts([Text(torch.arange(7), mask), text(9)], tmp_path / "shard-00000.safetensors")
    first, second = read_texts(tmp_path)
    assert first.token_ids.tolist() == [*range(7)] and torch.equal(first.loss_mask, mask)
    assert (first.prompt_length, first.num_learned, len(second)) == (1, 4, 9)
    [cut] = read_texts(tmp_path, min_answer=3, max_length=5)  # the first one has two answer tokens left
    assert len(cut) == 5


def test_answers_come_in_the_order_of_the_input_and_a_later_line_counts(tmp_path: Path) -> None:
    def line(index: int, ids: list[int]) -> str:
        return json.dumps(
            {"index": index, "status": "written", "texts": [{"token_ids": ids, "answers": [[1, len(ids)]]}]}
        )

    lines = [line(2, [5] * 6), json.dumps({"index": 0, "status": "failed"}), line(1, [6] * 7), line(0, [7] * 8)]
    (tmp_path / "answers.jsonl").write_text("\n".join(lines) + "\n" + line(3, [8] * 9)[:-5], encoding="utf-8")
    texts = read_texts(tmp_path)
    assert [t.token_ids[0].item() for t in texts] == [7, 6, 5]
    assert all(t.prompt_length == 1 for t in texts)


def test_what_says_how_texts_were_made_comes_back_or_is_refused(tmp_path: Path) -> None:
    info = TextsInfo("tiny", 4096, "012", "abc", "def", "prepare", {"max_length": 9}, {"read": 3})
    info.save(tmp_path)
    assert read_infos(tmp_path) == [info]
    (tmp_path / "texts.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InvalidConfiguration, match="make the texts again"):
        read_infos(tmp_path)
