"""The target and the draft LM: short runs whose folders transformers loads, and losses that fall."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dspark import load_drafter, load_target
from dspark.errors import InvalidConfiguration
from dspark.train.draft_lm import DraftSettings, train_draft
from dspark.train.regenerate import Row, save_shard
from dspark.train.target_lm import TargetSettings, packed, train_target
from train.conftest import CODE, MATH, PLAIN, SHAPE


def test_a_target_from_a_folder_of_text(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = dict(batch=4, row_length=16, num_validation=8, log_every=10, save_seconds=1e9)
    losses = train_target(data, tmp_path, TargetSettings((MATH, CODE, PLAIN), **SHAPE, steps=40, **short))
    assert set(losses) == {MATH.path, CODE.path, PLAIN.path, "math", "code"}
    assert losses["math"] == losses[MATH.path]
    between = sorted([losses[CODE.path], losses[PLAIN.path]])
    assert between[0] <= losses["code"] <= between[1]
    printed = [float(line.split("loss=")[1]) for line in capsys.readouterr().out.splitlines() if "loss=" in line]
    assert printed[-1] < 0.7 * printed[0]

    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16 and model.config.vocab_size == len(tokenizer) == 300
    ids = [tokenizer.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>")]
    assert ids == [0, 1, 2, 3] and model.generation_config.eos_token_id == 2
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a 12é"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|im_start|>user\na 12é<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer(prompt)["input_ids"]) == prompt
    assert load_target(tmp_path, dtype="float32", device="cpu").vocab_size == 300


def test_a_deeper_target_begins_as_the_one_it_grows_from(target_folder: Path, data: Path, tmp_path: Path) -> None:
    short = dict(steps=0, row_length=16, num_validation=2, start_from=str(target_folder))
    losses = train_target(data, tmp_path, TargetSettings((MATH,), **{**SHAPE, "num_hidden_layers": 7}, **short))
    assert losses["math"] > 0
    shallow, deep = (AutoModelForCausalLM.from_pretrained(path) for path in (target_folder, tmp_path))
    assert len(deep.model.layers) == 7 > len(shallow.model.layers)
    ids = torch.randint(4, 300, (2, 20))
    torch.testing.assert_close(deep(ids).logits, shallow(ids).logits, atol=0.05, rtol=0.01)  # weights are bf16
    assert (tmp_path / "tokenizer.json").read_text() == (target_folder / "tokenizer.json").read_text()


def test_a_run_that_is_stopped_early_ends_at_the_rate_it_had(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = dict(batch=4, row_length=16, num_validation=2, log_every=1, save_seconds=1e9)

    def printed(**steps: int) -> list[str]:
        train_target(data, tmp_path, TargetSettings((MATH,), **SHAPE, **short, **steps))
        return [line.split("loss=")[1] for line in capsys.readouterr().out.splitlines() if "loss=" in line]

    whole, part = printed(steps=12), printed(steps=12, stop_after=8)
    assert part == whole[:8]
    assert printed(steps=8) != part  # whose rate falls to 0 sooner


def test_a_target_cannot_grow_into_another_width(target_folder: Path, data: Path, tmp_path: Path) -> None:
    short = dict(steps=0, row_length=16, start_from=str(target_folder))
    with pytest.raises(InvalidConfiguration, match="cannot grow into 3 layers"):
        train_target(data, tmp_path, TargetSettings((MATH,), **{**SHAPE, "num_hidden_layers": 3}, **short))
    with pytest.raises(InvalidConfiguration, match="'hidden_size': 64"):
        train_target(data, tmp_path, TargetSettings((MATH,), **{**SHAPE, "hidden_size": 64}, **short))


def test_rows_begin_where_documents_do_and_each_is_used_once() -> None:
    documents = [[i] * 10 for i in range(30)] + [list(range(100, 150))]
    rows = list(packed(documents, 16, random.Random(0)))
    assert rows and all(len(row) == 17 for row in rows)
    assert all(row[:9] in ([row[0]] * 9, list(range(row[0], row[0] + 9))) for row in rows)
    starts = [row[0] for row in rows]
    assert len(starts) == len(set(starts))


def test_a_source_too_small_for_a_row_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfiguration, match=r"a row of 100000 tokens in 'sums/chat.jsonl'"):
        train_target(data, tmp_path, TargetSettings((MATH,), **SHAPE, steps=1, row_length=100_000))


def test_a_draft_model_for_a_target(target_folder: Path, tmp_path: Path) -> None:
    rows = [Row([7, 8, 9, *(10 + (i + j) % 12 for j in range(24))], 3) for i in range(20)]
    save_shard(rows, tmp_path / "shard-0000.safetensors")
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8, intermediate_size=32)
    train_draft(target_folder, tmp_path, tmp_path / "draft", DraftSettings(**shape, steps=4, tokens_per_batch=160))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "draft", dtype=torch.float32)
    assert model.config.vocab_size == 300 and model.generation_config.eos_token_id == 2
    assert model.lm_head.weight is model.model.embed_tokens.weight
    target = load_target(target_folder, dtype="float32", device="cpu")
    assert load_drafter(tmp_path / "draft", target).length == 4
    on = DraftSettings(**shape, steps=0, start_from=str(tmp_path / "draft"))
    train_draft(target_folder, tmp_path, tmp_path / "same", on)
    same = AutoModelForCausalLM.from_pretrained(tmp_path / "same", dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
