"""`dspark calibrate` on the embedded pair: what it prints, what it leaves behind, and who uses it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cli.command import PAIR, base_model, is_one_line_error, run, run_json
from dspark import load_drafter, load_target
from dspark.budget.calibration import Calibration, Outcomes
from dspark.checkpoints.confidence_bias import BIAS, add_to_confidence_bias
from dspark.cli.calibrate import _bias

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


def test_questions_are_continued_by_a_base_model(
    capsys: pytest.CaptureFixture[str], drafter: Path, tmp_path: Path
) -> None:
    data = tmp_path / "beginnings.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Chapter {n}\n\nIt was a river"}) + "\n" for n in range(40)))
    target = ("--target", base_model(tmp_path / "base"), "--drafter", str(drafter))
    result = run_json(capsys, "calibrate", *target, "--data", str(data), "--max-tokens", "40", "--dry-run")
    assert result["judged"]["held out"]["raw"]["num_rounds"] > 100


def test_a_head_that_is_off_everywhere_is_corrected(
    capsys: pytest.CaptureFixture[str], data: Path, drafter: Path
) -> None:
    shipped = load_file(drafter / "model.safetensors")
    add_to_confidence_bias(drafter, 1.5)
    run_json(capsys, "calibrate", "--data", str(data), "--drafter", str(drafter), "--max-tokens", "96", "--fit-bias")
    now = load_file(drafter / "model.safetensors")
    assert {name for name in now if not torch.equal(now[name], shipped[name])} <= {BIAS}
    assert float(now[BIAS]) == pytest.approx(float(shipped[BIAS]), abs=0.5)
    stored = Calibration.load(drafter / "calibration.json")
    assert load_drafter(str(drafter), load_target("tiny")).calibration == stored  # type: ignore[attr-defined]


def test_a_bias_that_does_not_help_elsewhere_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    def rounds(share: float) -> Outcomes:
        accepted = torch.rand(4_000, 1, generator=torch.Generator().manual_seed(0)) < share
        yes = torch.ones_like(accepted)
        return Outcomes(torch.full((4_000, 1), 0.5), yes, accepted, yes, torch.zeros(4_000).long(), ("all",))

    assert _bias(rounds(0.3), rounds(0.3)) < -0.5
    assert "gets bias" in capsys.readouterr().err
    assert _bias(rounds(0.3), rounds(0.6)) == 0.0
    assert "stays as it is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--data", "{data}", "--prompts", "1"], "--prompts must be 2 or more"),
        (["--data", "{data}", "--drafter", "ngram"], "no confidence head"),
        (["--data", "{data}", "--drafter", "dflash", "--dry-run"], "no confidences"),
        (["--data", "{data}"], "dspark comes with the package"),
        (["--data", "{data}", "--fit-bias", "--out", "elsewhere"], "leave --out out"),
        (["--data", "{data}", "--prompts", "2", "--max-tokens", "24", "--dry-run"], "use more prompts"),
    ],
)
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], data: Path, options: list[str], expected: str
) -> None:
    code, _, err = run(capsys, "calibrate", *(o.format(data=data) for o in options))
    assert code == 2 and is_one_line_error(err) and expected in err
