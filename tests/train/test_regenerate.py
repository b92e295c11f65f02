"""What the target writes for its drafters: its own answers, cut after an end token, and nothing made up around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dspark.errors import InvalidConfiguration
from dspark.train.data import load_prompts
from dspark.train.regenerate import RegenerateSettings, end_tokens_of, regenerate, sample, write_answers
from train.conftest import CODE, MATH

SETTINGS = RegenerateSettings((MATH, CODE), max_prompt=60, max_new=24, batch=8, chunk=24, num_tokens=600)


def greedy(logits: Tensor, owners: Tensor, num_written: int) -> Tensor:
    return logits.argmax(-1)


@pytest.fixture(scope="module")
def model(target_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32).eval()


@torch.no_grad()
def written_alone(model: Any, prompt: list[int], num: int) -> list[int]:
    """One token at a time, without cache or batch."""
    tokens = list(prompt)
    for _ in range(num):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_answers_are_those_each_prompt_gets_alone_up_to_its_end_token(model: Any) -> None:
    rng = torch.Generator().manual_seed(0)
    prompts = [torch.randint(4, 300, (n,), generator=rng).tolist() for n in (3, 17, 9, 1, 12, 30)]
    whole = [written_alone(model, prompt, 20) for prompt in prompts]
    assert write_answers(model, prompts, greedy, 20, [-1]) == whole
    assert len({tuple(answer) for answer in whole}) == len(whole), "a model that ignores its prompt tests nothing"
    ends = [whole[0][6], whole[1][2], whole[4][11]]  # several rows end, at different times: the batch shrinks
    cut = [answer[: min([i + 1 for i, t in enumerate(answer) if t in ends], default=20)] for answer in whole]
    assert sum(len(answer) < 20 for answer in cut) >= 3
    assert write_answers(model, prompts, greedy, 20, ends) == cut


def test_drawing_follows_each_rows_own_temperature() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([[1.0, 0.0, -1.0]])
    for temperature, row in ((0.5, 0), (2.0, 1)):
        draws = sample([0.5, 2.0])(logits.expand(20_000, 3), torch.full((20_000,), row), 0)
        law = torch.softmax(logits[0] / temperature, -1)
        assert ((draws.bincount(minlength=3) / 20_000 - law).abs() < 5 * (law * (1 - law) / 20_000).sqrt()).all()


@pytest.fixture(scope="module")
def written(target_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("texts")
    regenerate(target_folder, data, out, SETTINGS)
    return out


def rows_of(shard: Path) -> list[tuple[list[int], int]]:
    tensors = load_file(shard)
    assert int(tensors["lengths"].sum()) == len(tensors["token_ids"])
    rows = tensors["token_ids"].split(tensors["lengths"].tolist())
    return [(row.tolist(), n) for row, n in zip(rows, tensors["prompt_lengths"].tolist(), strict=True)]


def test_rows_are_training_prompts_with_an_answer(written: Path, target_folder: Path, data: Path, model: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(target_folder)
    prompts = load_prompts(data, [MATH, CODE], tokenizer, SETTINGS.max_prompt)
    known = {tuple(prompt.token_ids): prompt.domain for source in prompts for prompt in prompts[source]}
    ends = end_tokens_of(model)
    assert ends == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    tokens = {"math": 0, "code": 0}
    shards = sorted(written.glob("shard-*.safetensors"))
    assert len(shards) >= 2 and not list(written.glob("*.partial"))
    for shard in shards:
        rows = rows_of(shard)
        assert len(rows) == SETTINGS.chunk
        for row, prompt_length in rows:
            answer = row[prompt_length:]
            tokens[known[tuple(row[:prompt_length])]] += len(answer)  # held-out prompts are not known
            assert 1 <= len(answer) <= SETTINGS.max_new
            assert not set(ends) & set(answer[:-1])
            assert len(answer) == SETTINGS.max_new or answer[-1] in ends
    assert sum(tokens.values()) >= SETTINGS.num_tokens and min(tokens.values()) > 0


def test_going_on_adds_other_text(written: Path, target_folder: Path, data: Path) -> None:
    before = {path: path.read_bytes() for path in written.iterdir()}
    regenerate(target_folder, data, written, RegenerateSettings(**{**vars(SETTINGS), "num_tokens": 1}))
    [new] = set(written.iterdir()) - set(before)
    assert all(path.read_bytes() == content for path, content in before.items())
    answers = {tuple(row[n:]) for path in before for row, n in rows_of(path)}
    assert not answers & {tuple(row[n:]) for row, n in rows_of(new) if len(row) - n > 4}


def test_a_domain_without_prompts_is_refused(target_folder: Path, data: Path, tmp_path: Path) -> None:
    settings = RegenerateSettings((MATH, CODE), max_prompt=2, num_tokens=1)
    with pytest.raises(InvalidConfiguration, match="code, math has none: raise max_prompt"):
        regenerate(target_folder, data, tmp_path, settings)
