"""Where training text comes from: folders of rows, their shares, and what is held out of them.

A data folder holds one folder per source with `chat.jsonl` rows {"id", "conversations": [{"role", "content"}]} or
`code.jsonl` rows {"text"}. The last 2 % of every file are held out, from the target and from its drafters alike.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark.errors import InvalidConfiguration

HELD_OUT_FRACTION = 0.02


@dataclass(frozen=True)
class Source:
    """One file of text: its path inside the data folder, its domain, and its share of the training tokens (any unit)."""

    path: str
    domain: str
    share: float


@dataclass(frozen=True)
class Prompt:
    """The first user turn of one row, as token ids that end where the answer begins."""

    source: str
    domain: str
    token_ids: list[int]


def read_rows(data: Path, source: Source) -> list[dict[str, Any]]:
    """All rows of one source, in file order."""
    path = data / source.path
    if not path.is_file():
        raise InvalidConfiguration(
            f"expected the source {source.path!r} in the data folder {data}; it is not there: "
            "give --data the folder that holds it, or take it out of the recipe"
        )
    with path.open(encoding="utf-8") as file:
        return [parsed(line, f"{path}, line {number}") for number, line in enumerate(file, 1)]


def parsed(line: str, where: str) -> dict[str, Any]:
    """One row, with turns of which each has a role and content, or with text."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidConfiguration(f"{where}: expected one JSON object; {error}. Mend or remove the line") from error
    if not isinstance(row, dict) or not ("conversations" in row or "text" in row):
        raise InvalidConfiguration(
            f'{where}: expected {{"conversations": [...]}} or {{"text": "..."}}; got {line.strip()[:60]}'
        )
    if not all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in row.get("conversations", [])):
        raise InvalidConfiguration(f'{where}: expected turns {{"role": ..., "content": ...}}; one lacks a key')
    return row


def split_held_out(rows: list[Any]) -> tuple[list[Any], list[Any]]:
    """(train, held out): by position and not at random, so that every stage of a recipe leaves out the same rows."""
    num_held = max(1, int(len(rows) * HELD_OUT_FRACTION))
    return rows[:-num_held], rows[-num_held:]


def first_user_turn(row: dict[str, Any]) -> str | None:
    """What the user asks first; None for plain text and for rows in which someone else speaks first."""
    turns = row.get("conversations") or [{"role": None}]
    return turns[0]["content"] if turns[0]["role"] == "user" else None


def load_prompts(
    data: Path, sources: Iterable[Source], tokenizer: Any, max_tokens: int, held_out: bool = False
) -> dict[Source, list[Prompt]]:
    """Prompts of every chat source, through the tokenizer's chat template; longer ones than max_tokens are left out."""
    prompts = {}
    for source in sources:
        rows = split_held_out(read_rows(data, source))[held_out]
        questions = [question for row in rows if (question := first_user_turn(row))]
        texts = [
            tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False)
            for q in questions
        ]
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        prompts[source] = [Prompt(source.path, source.domain, ids) for ids in encoded if len(ids) <= max_tokens]
    return prompts


def in_random_order(prompts: list[Prompt], rng: random.Random) -> Iterator[Prompt]:
    """Endless passes over the prompts, each pass in an order of its own."""
    while True:
        yield from rng.sample(prompts, len(prompts))
