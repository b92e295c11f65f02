"""Texts to learn from: token ids with a mask of what may be learned, in a folder that says how it was made.

A folder holds `shard-*.safetensors` (written by `dspark data prepare`), `answers.jsonl` (by `dspark data regenerate`)
or both, at any depth, and `texts.json` beside each, with the chat template and system prompt they were made with.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dspark.errors import InvalidConfiguration
from dspark.train.files import replace_file

SHARDS, ANSWERS, INFO = "shard-*.safetensors", "answers.jsonl", "texts.json"


@dataclass(frozen=True, eq=False)
class Text:
    """token_ids [S] int32; loss_mask [S] marks the tokens that may be learned: the answer's, or all of a plain text's."""

    token_ids: Tensor
    loss_mask: Tensor

    @classmethod
    def after_prompt(cls, token_ids: Tensor, prompt_length: int) -> Text:
        """One prompt with one answer behind it."""
        return cls(token_ids, torch.arange(len(token_ids)) >= prompt_length)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_learned(self) -> int:
        """Tokens that may be learned."""
        return int(self.loss_mask.sum())

    @property
    def prompt_length(self) -> int:
        """Tokens before the first one to be learned: what a decoding request begins with."""
        return int(self.loss_mask.long().argmax())

    def cut(self, max_length: int) -> Text:
        """Its beginning, of max_length tokens at most."""
        return self if len(self) <= max_length else Text(self.token_ids[:max_length], self.loss_mask[:max_length])


@dataclass(frozen=True)
class TextsInfo:
    """How a folder of texts was made. Hashes are SHA-256; counts add up: written + failed + skipped = read."""

    target: str
    vocab_size: int
    tokenizer: str
    template: str
    system_prompt: str
    made_by: str
    settings: dict[str, Any]
    counts: dict[str, int]

    def save(self, folder: Path) -> None:
        """Write texts.json into the folder, whole or not at all."""
        with replace_file(folder / INFO) as partial:
            partial.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read_infos(folder: Path) -> list[TextsInfo]:
    """One for every texts.json below the folder; shards of older versions have none."""
    infos = []
    for path in sorted(folder.rglob(INFO)):
        try:
            infos.append(TextsInfo(**json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, TypeError) as error:
            raise InvalidConfiguration(
                f"{path} is not what `dspark data` writes ({error}); make the texts again"
            ) from error
    return infos


def save_texts(texts: Sequence[Text], path: Path) -> None:
    """One shard: texts end to end. Written aside first, so readers see whole files."""
    with replace_file(path) as partial:
        save_file(
            {
                "token_ids": torch.cat([text.token_ids.int() for text in texts]),
                "loss_mask": torch.cat([text.loss_mask for text in texts]),
                "lengths": torch.tensor([len(text) for text in texts], dtype=torch.int32),
            },
            partial,
        )


def read_texts(folder: Path, min_answer: int = 4, max_length: int = 4096) -> list[Text]:
    """All texts below the folder, in the order of the files' names; those with too little to learn from are left out."""
    shards, logs = sorted(folder.glob(f"**/{SHARDS}")), sorted(folder.glob(f"**/{ANSWERS}"))
    if not shards and not logs:
        raise InvalidConfiguration(
            f"expected texts written by `dspark data prepare` or `dspark data regenerate` below {folder}; there are none"
        )
    found = [text for path in shards for text in _read_shard(path)] + [
        text for path in logs for text in read_answers(path)
    ]
    texts = [cut for text in found if (cut := text.cut(max_length)).num_learned >= min_answer]
    if not texts:
        raise InvalidConfiguration(
            f"expected answers of at least {min_answer} tokens below {folder}; none of its rows has one: "
            "write text with more tokens per prompt (max_new), or raise max_length"
        )
    return texts


def _read_shard(path: Path) -> Iterator[Text]:
    shard = load_file(path)
    lengths = shard["lengths"].tolist()
    rows = shard["token_ids"].split(lengths)
    if "loss_mask" in shard:
        yield from (Text(row, mask) for row, mask in zip(rows, shard["loss_mask"].split(lengths), strict=True))
    else:  # the embedded pair's shards: one prompt, one answer
        prompts = shard["prompt_lengths"].tolist()
        yield from (Text.after_prompt(row, prompt) for row, prompt in zip(rows, prompts, strict=True))


def read_log(path: Path) -> dict[int, dict[str, Any]]:
    """The last entry of every record of an answers.jsonl, by the record's place in the input.

    A last line without its end was being written when the process died: it does not count.
    """
    entries: dict[int, dict[str, Any]] = {}
    with path.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                entry = json.loads(line)
                entries[entry["index"]] = entry
    return entries


def read_answers(path: Path) -> Iterator[Text]:
    """The texts of an answers.jsonl in the order of its input, whatever order they were finished in."""
    for _, entry in sorted(read_log(path).items()):
        for text in entry.get("texts", ()):
            mask = torch.zeros(len(text["token_ids"]), dtype=torch.bool)
            for begin, end in text["answers"]:
                mask[begin:end] = True
            yield Text(torch.tensor(text["token_ids"], dtype=torch.int32), mask)


def split_validation(texts: Sequence[Text], num_validation: int, seed: int = 0) -> tuple[list[Text], list[Text]]:
    """(train, validation): a random choice that depends on the texts and the seed only."""
    order = list(texts)
    random.Random(seed).shuffle(order)
    return order[num_validation:], order[:num_validation]


def batches(texts: Sequence[Text], tokens_per_batch: int, rng: random.Random, pool: int = 2048) -> Iterator[list[Text]]:
    """One pass in random order: batches of similar lengths, tokens_per_batch with padding at most (or a single text)."""
    order = rng.sample(list(texts), len(texts))
    for first in range(0, len(order), pool):
        near = sorted(order[first : first + pool], key=len)
        made: list[list[Text]] = []
        for text in reversed(near):  # longest first: each batch is as wide as its first text
            if made and len(made[-1][0]) * (len(made[-1]) + 1) <= tokens_per_batch:
                made[-1].append(text)
            else:
                made.append([text])
        rng.shuffle(made)
        yield from made


def pad(texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
    """(token_ids [B, S], loss_mask [B, S]), padded on the right."""
    width = max(map(len, texts))
    token_ids = torch.zeros(len(texts), width, dtype=torch.long)
    loss_mask = torch.zeros(len(texts), width, dtype=torch.bool)
    for row, text in enumerate(texts):
        token_ids[row, : len(text)] = text.token_ids.long()
        loss_mask[row, : len(text)] = text.loss_mask
    return token_ids, loss_mask
