"""Records in every spelling, and every bad line named by file and line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dspark.errors import InvalidConfiguration
from dspark.train.records import Malformed, Record, as_record, read_records

HELLO = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."})


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]},
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}], "source": "x"},
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}]},
    ],
)
def test_every_spelling_of_a_conversation_is_the_same_record(row: dict[str, object]) -> None:
    assert as_record({"id": 7, **row}, "here") == Record("7", "here", HELLO)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1, 2], "expected one JSON object; got a list"),
        ({"id": 3}, "expected conversations, messages, prompt, .* or a text.*got the keys id"),
        ({"text": ""}, "a text that is not empty"),
        ({"conversations": []}, "expected turns"),
        ({"conversations": "hello"}, "expected turns"),
        ({"turns": [1]}, "has no text"),
        ({"prompt": ""}, "got the keys prompt"),
        ({"conversations": [{"role": "user"}]}, "one lacks a key"),
        ({"conversations": [{"role": "user", "content": None}]}, "one lacks a key or has no text"),
    ],
)
def test_what_is_no_record_says_why(row: object, message: str) -> None:
    found = as_record(row, "a.jsonl, line 3")
    assert isinstance(found, Malformed) and found.where == "a.jsonl, line 3"
    assert re.search(message, found.reason)


def write(path: Path) -> None:
    good = json.dumps({"text": "good"})
    path.write_bytes(f'{good}\n{{"conversations": [\n{good}\n\n'.encode() + b'{"text": "\xff"}\n' + good.encode())


def test_a_bad_line_stops_the_reading_with_its_place(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    with pytest.raises(InvalidConfiguration, match=r"a\.jsonl, line 2: expected one JSON object;.*--on-error skip"):
        list(read_records([str(tmp_path)]))


def test_or_is_skipped_and_still_counted(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl")
    found = list(read_records([str(tmp_path / "a.jsonl")], on_error="skip"))
    assert [type(f) for f in found] == [Record, Malformed, Record, Malformed, Record]
    assert [f.where.rpartition(" ")[2] for f in found] == ["1", "2", "3", "5", "6"]  # line 4 is empty
    assert "UTF-8" in found[3].reason  # type: ignore[union-attr]


def test_files_from_windows_are_read_like_others(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}\r\n')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfthree\r\n\r\nfour")
    assert [r.text for r in read_records([str(tmp_path)]) if isinstance(r, Record)] == ["one", "two", "three\n\nfour"]


@pytest.mark.parametrize("row", [{"prompt": "Hello"}, {"question": "Hello"}, {"turns": ["Hello"]}])
def test_a_question_is_a_conversation_that_nobody_has_answered(row: dict[str, object]) -> None:
    assert as_record({"id": 7, **row}, "here") == Record("7", "here", HELLO[:1])


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    for name in ("b/x.jsonl", "a/y.jsonl", "c.txt", "ignored.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n", encoding="utf-8")
    texts = [r.text for r in read_records([str(tmp_path)]) if isinstance(r, Record)]
    assert texts[:2] == ["a/y.jsonl", "b/x.jsonl"] and len(texts) == 3


def test_a_text_file_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    text = "\n\n".join(f"Paragraph {i}. " + "word " * 60 for i in range(30))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    pieces = [r.text for r in read_records([str(tmp_path / "book.txt")]) if isinstance(r, Record)]
    assert len(pieces) > 3 and "\n\n".join(p for p in pieces if p) == text
    assert all(p and len(p) <= 2000 and p.startswith("Paragraph") for p in pieces)


def test_parquet_rows_are_records_too(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table.from_pylist(
        [{"id": "a", "conversations": list(HELLO), "text": None}, {"id": "b", "text": "plain"}, {"id": "c"}]
    )
    parquet.write_table(table, tmp_path / "rows.parquet")
    first, second, third = read_records([str(tmp_path)], on_error="skip")
    assert first == Record("a", f"{tmp_path / 'rows.parquet'}, row 1", HELLO)
    assert isinstance(second, Record) and second.text == "plain"
    assert isinstance(third, Malformed) and third.where.endswith("rows.parquet, row 3")
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    with pytest.raises(InvalidConfiguration, match=r"broken\.parquet is not a readable Parquet file"):
        list(read_records([str(tmp_path / "broken.parquet")]))


@pytest.mark.parametrize("name", ["nowhere.jsonl", "no/such/place", "nowhere"])
def test_what_does_not_exist_is_named(name: str) -> None:
    with pytest.raises(InvalidConfiguration, match=f"{name} does not exist"):
        list(read_records([name]))


def test_a_dataset_of_the_hub_is_read_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> list[dict[str, Any]]:
        if name != "some/chats":
            raise FileNotFoundError(f"Dataset '{name}' doesn't exist on the Hub\nor cannot be accessed.")
        return [{"messages": list(HELLO), "text": None}, {"text": f"of {split}", "messages": None}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for name, split in (("some/chats", "train"), ("some/chats:test", "test")):
        chat, plain = read_records([name])
        assert isinstance(chat, Record) and chat.messages == HELLO
        assert isinstance(plain, Record) and plain.text == f"of {split}"
    with pytest.raises(InvalidConfiguration, match="other/chats could not be read from the hub") as raised:
        list(read_records(["other/chats"]))
    assert "\n" not in str(raised.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x", encoding="utf-8")
    with pytest.raises(InvalidConfiguration, match=r"expected a file that ends in \.jsonl"):
        list(read_records([str(tmp_path / "a.csv")]))
    with pytest.raises(InvalidConfiguration, match=r"expected files that end in \.jsonl"):
        list(read_records([str(tmp_path)]))
