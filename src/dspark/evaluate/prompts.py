"""Prompts of our own for checks that need some text and no data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark.engine.text import Prompt, has_chat_template
from dspark.errors import InvalidRequest

_SHAPES = (
    "A baker makes {a} trays of {b} rolls and sells 17 of them. How many are left? Answer step by step.",
    "Write a Python function `add_{a}` that adds {a} to every number of a list and drops those above {b}.",
    "What does the word river mean? Use it in {b} sentences.",
    "Hi, I'd like {b} large lattes with oat milk and {a} blueberry muffins please.",
    "Explain to a child of {b} years why the sky is blue.",
    "Count from {a} to {b}{a}, one number per line.",
    "Translate into French: there are {a} apples on the table and {b} cats under it.",
    "Write a short story about a ship with {a} sails and {b} sailors.",
)


def built_in(num_prompts: int) -> list[str]:
    """So many different prompts, the same ones every time."""
    return [_SHAPES[i % len(_SHAPES)].format(a=3 + i, b=5 + i // 2) for i in range(num_prompts)]


def fitting(tokenizer: Any, vocab_size: int, num_prompts: int) -> tuple[list[Prompt], bool]:
    """Built-in prompts as this target can read them, and whether they go in without a chat template."""
    if tokenizer is None:
        return [[(7 * i + 3 * k) % vocab_size for k in range(8)] for i in range(num_prompts)], False
    return list(built_in(num_prompts)), not has_chat_template(tokenizer)


@dataclass(frozen=True)
class Sample:
    """A prompt and the kind of traffic it stands for."""

    prompt: Prompt
    domain: str = "all"


def from_file(path: Path) -> list[Sample]:
    """One prompt a line; in a .jsonl file an object with `messages`, `prompt` or `question`, and perhaps a `domain`."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except OSError as error:
        raise InvalidRequest(f"the prompts file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the prompts file {path} is not UTF-8: {error}") from error
    read = _of_json if path.suffix == ".jsonl" else Sample
    samples = [read(line) for line in lines if line]
    if not samples:
        raise InvalidRequest(f"{path} holds no prompt; write one per line")
    return samples


def _of_json(line: str) -> Sample:
    try:
        row = json.loads(line)
        return Sample(
            next(row[key] for key in ("messages", "prompt", "question") if key in row), str(row.get("domain", "all"))
        )
    except (ValueError, StopIteration, TypeError, AttributeError) as error:
        raise InvalidRequest(
            f"expected a JSON object with `messages`, `prompt` or `question` on each line; got {line[:60]!r}"
        ) from error
