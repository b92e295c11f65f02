"""Text in: what is held out stays out, and bad rows are named."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from dspark.errors import InvalidConfiguration
from dspark.train.data import Prompt, Source, first_user_turn, in_random_order, load_prompts, read_rows, split_held_out
from train.conftest import CODE, MATH, chat, write_rows


@pytest.mark.parametrize("num", [2, 49, 50, 99, 100, 1000])
def test_the_last_two_percent_are_held_out_and_nothing_is_in_both(num: int) -> None:
    train, held = split_held_out(list(range(num)))
    assert train + held == list(range(num))
    assert len(held) == max(1, num // 50)


def test_held_out_prompts_are_not_training_prompts(data: Path, target_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(target_folder)
    train, held = (load_prompts(data, [MATH, CODE], tokenizer, 100, held_out=held) for held in (False, True))
    for source, num in ((MATH, 150), (CODE, 100)):
        seen, unseen = ({tuple(p.token_ids) for p in prompts[source]} for prompts in (train, held))
        assert len(seen) + len(unseen) == num and len(unseen) == num // 50
        assert not seen & unseen


def test_a_prompt_is_the_first_user_turn_and_ends_where_the_answer_begins(data: Path, target_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(target_folder)
    first = load_prompts(data, [MATH], tokenizer, 100)[MATH][3]
    assert tokenizer.decode(first.token_ids) == "<|im_start|>user\nWhat is 3 + 3?<|im_end|>\n<|im_start|>assistant\n"
    assert (first.source, first.domain) == (MATH.path, "math")


def test_rows_in_which_no_user_speaks_first_have_no_prompt() -> None:
    assert first_user_turn(chat("Hello?", "Hi.", "More?", "No.")) == "Hello?"
    assert first_user_turn(chat("Welcome!", "Hello", first="assistant")) is None
    assert first_user_turn({"text": "plain"}) is None
    assert first_user_turn({"conversations": []}) is None


def test_prompts_that_are_too_long_are_left_out(tmp_path: Path, target_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(target_folder)
    rows = [chat("What is 1?", "1"), chat("word " * 50, "2"), chat("What is 2?", "2"), chat("last", "held out")]
    write_rows(tmp_path / MATH.path, rows)
    [short, _] = load_prompts(tmp_path, [MATH], tokenizer, 1000)[MATH][::2]
    kept = load_prompts(tmp_path, [MATH], tokenizer, len(short.token_ids))[MATH]
    assert kept[0].token_ids == short.token_ids and len(kept) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"conversations": [', "expected one JSON object"),
        ("", "expected one JSON object"),
        ("[1, 2]", "expected {"),
        ('{"id": 3}', "expected {"),
        ('{"conversations": [{"role": "user"}]}', "expected turns {.*lacks a key"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": "good"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(InvalidConfiguration, match=rf"a\.jsonl, line 3: {message}"):
        read_rows(tmp_path, Source("a.jsonl", "code", 1))


def test_a_missing_source_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfiguration, match=r"'x/chat.jsonl'.*give --data"):
        read_rows(tmp_path, Source("x/chat.jsonl", "code", 1))


def test_every_pass_has_every_prompt_once_in_its_own_order() -> None:
    prompts = [Prompt("a", "math", [i]) for i in range(20)]
    endless = in_random_order(prompts, random.Random(0))
    first, second = ([next(endless) for _ in prompts] for _ in range(2))
    assert sorted(p.token_ids for p in first) == sorted(p.token_ids for p in second) == [p.token_ids for p in prompts]
    assert first != second
