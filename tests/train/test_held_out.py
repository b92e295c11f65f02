"""Which questions a measurement may ask: those nobody trained on, by domain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dspark.errors import InvalidConfiguration
from dspark.train.data import Source
from dspark.train.held_out import choose, questions_of


def write(path: Path, rows: list[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def chat(question: str) -> dict[str, object]:
    return {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]}


def test_a_training_folder_gives_what_training_leaves_out(tmp_path: Path) -> None:
    write(tmp_path / "a" / "chat.jsonl", [chat(f"a{i}") for i in range(200)])
    write(tmp_path / "b" / "chat.jsonl", [chat(f"b{i}") for i in range(50)])
    found = questions_of(tmp_path)
    assert {d: set(q) for d, q in found.items()} == {"a": {"a196", "a197", "a198", "a199"}, "b": {"b49"}}
    sources = [Source("a/chat.jsonl", "one", 3), Source("b/chat.jsonl", "one", 1)]
    assert set(questions_of(tmp_path, sources)["one"]) == {"a196", "a197", "a198", "a199", "b49"}


def test_files_are_read_whole_in_any_usual_form(tmp_path: Path) -> None:
    sharegpt = {"messages": [{"from": "system", "value": "s"}, {"from": "human", "value": "two"}]}
    write(tmp_path / "gsm8k.jsonl", [{"turns": ["one", "more"]}, sharegpt, {"question": "three"}, chat("four")])
    write(tmp_path / "mine.jsonl", [{"prompt": "five"}])
    assert {d: set(q) for d, q in questions_of(tmp_path).items()} == {
        "math": {"one", "two", "three", "four"},
        "mine": {"five"},
    }
    assert questions_of(tmp_path / "mine.jsonl") == {"mine": ["five"]}


def test_a_line_ends_where_json_says(tmp_path: Path) -> None:
    rows = [{"prompt": "one\u2028line"}, {"prompt": "two"}]
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert sorted(questions_of(tmp_path)["a"]) == ["one\u2028line", "two"]


def test_domains_take_turns() -> None:
    questions = {"a": ["a1", "a2", "a3"], "b": ["b1"]}
    assert choose(questions, 3) == [("a", "a1"), ("b", "b1"), ("a", "a2")]
    assert len(choose(questions, 99)) == 4


@pytest.mark.parametrize(("line", "expected"), [("{", "JSON"), ('{"x": 1}', "conversations"), ("[]", "JSON object")])
def test_a_bad_row_is_named(tmp_path: Path, line: str, expected: str) -> None:
    (tmp_path / "mine.jsonl").write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(InvalidConfiguration, match=rf"mine.jsonl, line 2.*{expected}"):
        questions_of(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfiguration, match=r"expected a \.jsonl file"):
        questions_of(tmp_path)
