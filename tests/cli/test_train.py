"""From a folder of text to a drafter that the engine runs, by the three commands that the documentation shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.command import is_one_line_error, run, run_json

Capture = pytest.CaptureFixture[str]
RECIPE = """
[drafter]
kind = "dspark"
num_hidden_layers = 1
markov_rank = 16

[train]
steps = 4
tokens_per_batch = 256
anchors_per_batch = 32
start_from_target = true
num_validation = 3
validate_every = 2
validation_prompts = 2
validation_tokens = 8
log_every = 1

[run]
target = "tiny"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    (folder / "text").mkdir()
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Tom has {i} apples and buys {i + 4} more. How many apples does he have?"}
            ]
        }
        for i in range(9)
    ]
    (folder / "text" / "mine.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    (folder / "text" / "note.txt").write_text("The river is long. It flows to the sea.", encoding="utf-8")
    (folder / "mine.toml").write_text(RECIPE, encoding="utf-8")
    return folder


def test_three_commands(capsys: Capture, folder: Path) -> None:
    texts, out = str(folder / "answers"), str(folder / "run")
    one = ("--threads", "1")
    answer = ("--max-new", "24", "--text-prompt", "4", *one)
    code, _, err = run(capsys, "data", "regenerate", str(folder / "text"), "--target", "tiny", "--out", texts, *answer)
    assert code == 0 and "10 records read = 10 written" in err, err
    train = ("train", str(folder / "mine.toml"), "--data", texts, "--out", out, *one)
    code, told, err = run(capsys, *train, "--dry-run")
    assert code == 0 and "whole run: 4 steps" in told and "tau to expect" in told, err
    code, _, err = run(capsys, *train)
    assert code == 0, err
    assert (Path(out) / "report.html").stat().st_size > 4000
    assert "decoded tau" in err and f"--drafter {Path(out) / 'mine'}" in err
    drafted = run_json(capsys, "generate", "What is 3 plus 4?", "--drafter", f"{out}/mine", "--max-tokens", "12", *one)
    assert sum(drafted for drafted, _, _ in drafted["rounds"]) > 0

    code, _, err = run(capsys, *train)
    assert code == 2 and "go on with --resume" in err and is_one_line_error(err)
    code, _, err = run(capsys, *train, "--resume", "--steps", "5")
    assert code == 0 and "going on from step 4" in err and "step 5" in err


def test_a_recipe_that_comes_with_the_package(capsys: Capture, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    code, _, err = run(capsys, "train", "quick", "--target", "tiny")
    assert code == 2 and "in the [run] table of" in err and "quick.toml" in err  # it was read: only --data is missing
    code, _, err = run(capsys, "train", "quack", "--target", "tiny")
    assert code == 2 and "the recipe quack cannot be read" in err and "or quick" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "expected data: give --data"),
        (("--threads", "0"), "--threads must be 1 or more"),
        (("--data", "nowhere", "--out", "x"), "expected texts written by `dspark data prepare`"),
        (("--data", "nowhere", "--out", "x", "--target", "no/such/thing/here"), "does not exist"),
    ],
)
def test_mistakes(capsys: Capture, folder: Path, flags: tuple[str, ...], message: str) -> None:
    code, _, err = run(capsys, "train", str(folder / "mine.toml"), *flags)
    assert code == 2 and message in err and is_one_line_error(err)
