"""Questions that no drafter was trained on, by domain: what calibration and other measurements put to a target."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dspark.errors import InvalidConfiguration
from dspark.train.data import Source, first_user_turn, read_rows, split_held_out
from dspark.train.records import UTF8, Malformed, as_record
from dspark.train.regenerate import RegenerateSettings
from dspark.train.settings import read_recipe

_DOMAIN_OF_FILE = {"gsm8k": "math", "svamp": "math", "humaneval": "code", "mbpp": "code", "mt-bench": "chat"}


def questions_of(path: Path, sources: Sequence[Source] = (), seed: int = 0) -> dict[str, list[str]]:
    """First user turns by domain, in random order.

    A .jsonl file or a folder of them is read whole. A data folder as training takes it (SOURCE/chat.jsonl) gives the last
    2 % of each source, because a drafter trained on it has seen the rest; `sources` name domains and shares within them.
    """
    rng = random.Random(seed)
    if path.is_file() or list(path.glob("*.jsonl")):
        files = [path] if path.is_file() else sorted(path.glob("*.jsonl"))
        found: dict[str, list[str]] = {}
        for file in files:
            found.setdefault(_DOMAIN_OF_FILE.get(file.stem, file.stem), []).extend(_questions_in(file))
        return {domain: rng.sample(texts, len(texts)) for domain, texts in found.items()}
    sources = sources or [Source(f"{p.parent.name}/chat.jsonl", p.parent.name, 1) for p in path.glob("*/chat.jsonl")]
    if not sources:
        raise InvalidConfiguration(f"expected a .jsonl file, a folder of them or SOURCE/chat.jsonl in it; got {path}")
    by_domain: dict[str, list[str]] = {}
    for domain in sorted({source.domain for source in sources}):
        pools = {s: _held_out(path, s, rng) for s in sources if s.domain == domain}
        by_domain[domain] = _by_shares({s: pool for s, pool in pools.items() if pool}, rng)
    return by_domain


def sources_of(recipe: Path) -> list[Source]:
    """The sources of a recipe: paths inside a data folder, their domains and shares."""
    return list(read_recipe(recipe, "regenerate", RegenerateSettings).sources)


def choose(questions: dict[str, list[str]], num: int) -> list[tuple[str, str]]:
    """(domain, question): as evenly from all domains as there are questions, at most num in all."""
    chosen: list[tuple[str, str]] = []
    turn, longest = 0, max(map(len, questions.values()), default=0)
    while len(chosen) < num and turn < longest:
        chosen += [(domain, texts[turn]) for domain, texts in questions.items() if turn < len(texts)]
        turn += 1
    return chosen[:num]


def _held_out(data: Path, source: Source, rng: random.Random) -> list[str]:
    rows = split_held_out(read_rows(data, source))[1]
    texts = [question for row in rows if (question := first_user_turn(row))]
    return rng.sample(texts, len(texts))


def _by_shares(pools: dict[Source, list[str]], rng: random.Random) -> list[str]:
    mixed = []
    while left := [source for source, pool in pools.items() if pool]:
        mixed.append(pools[rng.choices(left, [source.share for source in left])[0]].pop())
    return mixed


def _questions_in(file: Path) -> list[str]:
    questions = []
    for number, line in enumerate(_text_of(file).split("\n"), 1):
        if line.strip():
            where = f"{file}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InvalidConfiguration(f"{where}: expected one JSON object; {error}") from error
            questions.append(_first_question(row, where))
    return questions


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding=UTF8)
    except UnicodeDecodeError as error:
        raise InvalidConfiguration(f"{file}: expected UTF-8; {error}") from error


def _first_question(row: Any, where: str) -> str:
    """What the user says first."""
    record = as_record(row, where)
    if isinstance(record, Malformed):
        raise InvalidConfiguration(f"{where}: {record.reason}. Mend or remove it")
    for message in record.messages:
        if message["role"] == "user":
            return message["content"]
    raise InvalidConfiguration(f"{where}: expected a turn of the user; there is none. Remove it")
