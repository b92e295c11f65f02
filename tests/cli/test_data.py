"""`dspark data`: from files to texts, with every record accounted for and other settings refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cli.command import PAIR, base_model, is_one_line_error, run
from dspark.train.texts import read_infos, read_log, read_texts

Capture = pytest.CaptureFixture[str]
ANSWER = ("--max-new", "6", "--batch", "4", "--temperature", "1.0", "--threads", "1")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    chats = [{"id": str(i), "conversations": [{"role": "user", "content": f"What is {i}?"}]} for i in range(5)]
    lines = [json.dumps(row) for row in chats]
    lines.insert(2, "{broken")
    lines.append(
        json.dumps({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello there, you."}]})
    )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_prepare_accounts_for_every_record(capsys: Capture, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "texts"
    code, _, err = run(
        capsys, "data", "prepare", str(rows), "--target", "tiny", "--out", str(out), "--on-error", "skip"
    )
    assert code == 0, err
    assert "7 records read = 1 written + 6 skipped" in err
    assert "skipped 5: no assistant turn" in err and "skipped 1: malformed" in err
    [text] = read_texts(out)
    assert text.num_learned >= 4
    [info] = read_infos(out)
    assert (info.target, info.vocab_size, info.made_by) == ("tiny", 4096, "prepare")
    code, _, err = run(capsys, "data", "prepare", str(rows), "--target", "tiny", "--out", str(out))
    assert code == 2 and "expected a new or empty folder" in err


def test_a_malformed_line_stops_unless_told_otherwise(capsys: Capture, rows: Path, tmp_path: Path) -> None:
    code, _, err = run(capsys, "data", "prepare", str(rows), "--target", "tiny", "--out", str(tmp_path / "a"))
    assert code == 2 and is_one_line_error(err)
    assert re.search(r"rows\.jsonl, line 3: expected one JSON object", err)


def test_regenerate_goes_on_with_more_and_refuses_other_settings(capsys: Capture, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers"
    command = ("data", "regenerate", str(rows), "--target", str(PAIR / "target"), "--out", str(out), *ANSWER)
    command += ("--drafter", str(PAIR / "dspark"), "--on-error", "skip")
    code, _, err = run(capsys, *command, "--limit", "3")
    assert code == 0, err
    assert "3 records read = 2 written + 0 failed + 1 skipped" in err
    assert "skipped 1: expected one JSON object" in err
    first = (out / "answers.jsonl").read_bytes()
    code, _, err = run(capsys, *command)
    assert code == 0 and "7 records read = 6 written + 0 failed + 1 skipped" in err and "truncated" in err
    assert (out / "answers.jsonl").read_bytes().startswith(first)
    assert sorted(read_log(out / "answers.jsonl")) == list(range(7))
    assert read_infos(out)[0].counts["read"] == 7
    for change, named in ((("--seed", "1"), "seed = 0"), (("--system", "Be brief."), "another system prompt")):
        code, _, err = run(capsys, *command, *change)
        assert code == 2 and named in err and "use a new folder" in err


def test_a_base_model_says_why_it_answers_no_conversations(capsys: Capture, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("A river is a stream of water that flows to the sea.")
    inputs = (str(rows), str(tmp_path / "plain.txt"), "--on-error", "skip")
    target = ("--target", base_model(tmp_path / "base"), "--out", str(tmp_path / "answers"))
    code, _, err = run(capsys, "data", "regenerate", *inputs, *target, *ANSWER)
    assert code == 0 and "1 written + 0 failed + 7 skipped" in err
    assert "skipped 6: a conversation, and this tokenizer has no chat template" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--limit", "0"), "--limit must be 1 or more"),
        (("--threads", "0"), "--threads must be 1 or more"),
        (("--max-new", "0"), "max_new must be 1 or more"),
        (("--drafter", "nonsense"), "no drafter is called"),
    ],
)
def test_bad_flags(capsys: Capture, rows: Path, tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    command = ("data", "regenerate", str(rows), "--target", "tiny", "--out", str(tmp_path / "x"), *flags)
    code, _, err = run(capsys, *command)
    assert code == 2 and message in err and is_one_line_error(err)
