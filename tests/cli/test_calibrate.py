"""`dspark calibrate` on the embedded pair: what it prints, what it leaves behind, and who uses it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cli.command import PAIR, is_one_line_error, run, run_json
from dspark import load_drafter, load_target
from dspark.budget.calibration import Calibration

QUESTIONS = [f"Tom has {n} apples and buys {n + 3} more. How many apples has he?" for n in range(5, 45)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in QUESTIONS))
    return path


@pytest.fixture
def drafter(tmp_path: Path) -> Path:
    shutil.copytree(PAIR / "dspark", tmp_path / "drafter", ignore=shutil.ignore_patterns("calibration*", "sts.json"))
    return tmp_path / "drafter"


def test_a_drafter_is_calibrated_and_stays_so(capsys: pytest.CaptureFixture[str], data: Path, drafter: Path) -> None:
    target = load_target("tiny")
    assert load_drafter(str(drafter), target).calibration is None  # type: ignore[attr-defined]
    options = ["--data", str(data), "--drafter", str(drafter), "--max-tokens", "96"]
    result = run_json(capsys, "calibrate", *options)
    stored = Calibration.load(drafter / "calibration.json")
    assert stored.temperatures == tuple(result["calibrations"]["affine"]["temperatures"])
    assert stored.origin is not None and stored.origin.num_prompts == stored.origin.num_held_out_prompts == 20
    assert Calibration.load(drafter / "sts.json").offsets == ()
    assert load_drafter(str(drafter), target).calibration == stored  # type: ignore[attr-defined]
    assert result["judged"]["held out"]["raw"]["num_rounds"] == stored.origin.num_held_out_rounds > 100


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--data", "{data}", "--prompts", "1"], "--prompts must be 2 or more"),
        (["--data", "{data}", "--drafter", "ngram"], "no confidence head"),
        (["--data", "{data}", "--drafter", "dflash", "--dry-run"], "no confidences"),
        (["--data", "{data}", "--prompts", "2", "--max-tokens", "24", "--dry-run"], "use more prompts"),
    ],
)
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], data: Path, options: list[str], expected: str
) -> None:
    code, _, err = run(capsys, "calibrate", *(o.format(data=data) for o in options))
    assert code == 2 and is_one_line_error(err) and expected in err
