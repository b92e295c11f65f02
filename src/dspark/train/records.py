"""Text as users have it: chat records, ShareGPT records, questions or plain text; JSONL, Parquet, text files, hub datasets.

Every line of the input is accounted for unless it is empty: it is a record, or a `Malformed` that says where it is and
what is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark.errors import InvalidConfiguration

SUFFIXES = (".jsonl", ".parquet", ".txt", ".md")
UTF8 = "utf-8-sig"  # files from Windows may begin with a byte order mark
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}  # ShareGPT's
_PIECE = 2000  # characters of a text file that make one record


@dataclass(frozen=True)
class Record:
    """One example: a conversation (messages with role and content), or plain text. where names file and line."""

    id: str
    where: str
    messages: tuple[Mapping[str, str], ...] = ()
    text: str | None = None


@dataclass(frozen=True)
class Malformed:
    """A place in the input that is no record, and why."""

    where: str
    reason: str


def read_records(inputs: Sequence[str], on_error: str = "stop") -> Iterator[Record | Malformed]:
    """All records of files, folders (recursively, in the order of their names) and hub datasets (`owner/name`,
    `owner/name:split`).

    on_error  `stop` raises at the first malformed one; `skip` hands it out as Malformed and goes on
    """
    if on_error not in ("skip", "stop"):
        raise InvalidConfiguration(f"on-error must be skip or stop; got {on_error!r}")
    for name in inputs:
        for found in _read(name):
            if isinstance(found, Malformed) and on_error == "stop":
                raise InvalidConfiguration(
                    f"{found.where}: {found.reason}. Mend or remove it, or go on without it: --on-error skip"
                )
            yield found


def files_of(inputs: Sequence[str]) -> list[Path]:
    """The local files behind the inputs, in the order in which they are read; hub datasets have none here."""
    return [file for name in inputs if Path(name).expanduser().exists() for file in _files(Path(name).expanduser())]


def _read(name: str) -> Iterator[Record | Malformed]:
    path = Path(name).expanduser()
    if not path.exists():
        yield from _from_rows(_hub_rows(name))
        return
    for file in _files(path):
        if file.suffix == ".jsonl":
            yield from _from_jsonl(file)
        elif file.suffix == ".parquet":
            yield from _from_rows(_parquet_rows(file))
        else:
            yield from _from_text(file)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise InvalidConfiguration(
                f"{path}: expected a file that ends in {', '.join(SUFFIXES)}; rename or convert it"
            )
        return [path]
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in SUFFIXES)
    if not files:
        raise InvalidConfiguration(f"expected files that end in {', '.join(SUFFIXES)} below {path}; there are none")
    return files


def _from_jsonl(file: Path) -> Iterator[Record | Malformed]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue  # the end of many files
            where = f"{file}, line {number}"
            try:
                row = json.loads(line.decode(UTF8))
            except UnicodeDecodeError as error:
                yield Malformed(where, f"expected UTF-8; {error}")
            except json.JSONDecodeError as error:
                yield Malformed(where, f"expected one JSON object; {error}")
            else:
                yield as_record(row, where)


def _from_rows(rows: Iterable[tuple[str, Any]]) -> Iterator[Record | Malformed]:
    for where, row in rows:
        yield as_record(row, where)


def _from_text(file: Path) -> Iterator[Record | Malformed]:
    """Pieces of a text file, cut at blank lines."""
    try:
        text = file.read_text(encoding=UTF8)
    except UnicodeDecodeError as error:
        yield Malformed(str(file), f"expected UTF-8; {error}")
        return
    piece, number = "", 0
    for paragraph in text.split("\n\n"):
        if piece and len(piece) + len(paragraph) > _PIECE:
            number += 1
            yield Record(f"{file.stem}-{number}", f"{file}, piece {number}", text=piece)
            piece = ""
        piece += ("\n\n" if piece else "") + paragraph
    if piece.strip():
        yield Record(f"{file.stem}-{number + 1}", f"{file}, piece {number + 1}", text=piece)


def as_record(row: Any, where: str) -> Record | Malformed:
    """{"conversations" or "messages": turns}, a question to be answered, or {"text"}.

    Turns have role and content, or from and value. A question is what evaluation sets have: {"prompt"}, {"question"}, or
    {"turns"}, what the user says one after the other.
    """
    if not isinstance(row, Mapping):
        return Malformed(where, f"expected one JSON object; got a {type(row).__name__}")
    name = str(row.get("id", where))
    turns = row.get("conversations", row.get("messages", None if row.get("text") else _questions(row)))
    if turns is None:
        text = row.get("text")
        if isinstance(text, str) and text:
            return Record(name, where, text=text)
        keys = ", ".join(map(str, row)) or "none"
        expected = "conversations, messages, prompt, question, turns or a text that is not empty"
        return Malformed(where, f"expected {expected}; got the keys {keys}")
    if isinstance(turns, (str, bytes)) or not isinstance(turns, Sequence) or not turns:
        return Malformed(where, 'expected turns [{"role": ..., "content": ...}, ...]; got none')
    messages = []
    for turn in turns:
        turn = turn if isinstance(turn, Mapping) else {}
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            return Malformed(
                where, 'expected turns {"role": ..., "content": ...}; one lacks a key or has no text in it'
            )
        messages.append({"role": _ROLES.get(role, role), "content": content})
    return Record(name, where, tuple(messages))


def _questions(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    asked = next((row[key] for key in ("turns", "prompt", "question") if row.get(key)), None)
    if isinstance(asked, str):
        asked = [asked]
    if not isinstance(asked, list):
        return None
    return [dict(turn) if isinstance(turn, Mapping) else {"role": "user", "content": turn} for turn in asked]


def _parquet_rows(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise InvalidConfiguration(
            f'{file}: reading Parquet needs pyarrow: pip install "dspark[train]", or convert the file to JSONL'
        ) from error
    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                number += 1
                # Parquet gives every row every column: those without a value are not there
                yield f"{file}, row {number}", {key: value for key, value in row.items() if value is not None}
    except (ArrowException, OSError) as error:
        raise InvalidConfiguration(f"{file} is not a readable Parquet file ({error}); copy or make it again") from error


def _hub_rows(name: str) -> Iterator[tuple[str, Any]]:
    dataset, _, split = name.partition(":")
    if Path(name).suffix in SUFFIXES or dataset.count("/") != 1 or dataset.startswith((".", "/", "~")):
        raise InvalidConfiguration(f"{name} does not exist; expected a file, a folder or a hub dataset (owner/name)")
    try:
        import datasets
    except ImportError as error:
        raise InvalidConfiguration(
            f"{name} is not here; if it is a dataset on the hub, reading it needs: pip install datasets"
        ) from error
    try:
        rows = datasets.load_dataset(dataset, split=split or "train")
    except (OSError, ValueError) as error:  # what it raises for a name, a split or a network that is not there
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InvalidConfiguration(
            f"{name} could not be read from the hub ({reason}); check the spelling, the split (owner/name:split) and the "
            "network"
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"{name}, row {number}", {key: value for key, value in row.items() if value is not None}
