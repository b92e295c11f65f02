"""`dspark convert`: the embedded drafters, there and back."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cli.command import PAIR, is_one_line_error, run, run_json

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("name", ["dspark", "dflash"])
def test_the_embedded_drafters_to_vllm_and_back(capsys: Capture, tmp_path: Path, name: str) -> None:
    there = run_json(capsys, "convert", name, "--to", "speculators", "--out", str(tmp_path / "s"), "--target", "tiny")
    assert there["written_by"] == "DeepSpec" and there["to"] == "speculators"
    code, out, _ = run(capsys, "convert", str(tmp_path / "s"), "--to", "dspark", "--out", str(tmp_path / "d"))
    assert code == 0 and "speculators -> dspark" in out
    before, after = (load_file(folder / "model.safetensors") for folder in (PAIR / name, tmp_path / "d"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert run_json(capsys, "info", str(tmp_path / "d"), "--target", "tiny")["fits"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tiny", "--to", "dspark"], "is no drafter"),
        (["dflash", "--to", "deepspec"], "--target"),
        (["./nowhere", "--to", "dspark"], "does not exist"),
    ],
)
def test_mistakes(capsys: Capture, tmp_path: Path, argv: list[str], message: str) -> None:
    code, out, err = run(capsys, "convert", *argv, "--out", str(tmp_path / "out"))
    assert code == 2 and out == "" and message in err
    assert is_one_line_error(err)


@pytest.mark.parametrize("full", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("No space left")])
def test_a_full_disk_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, full: Exception
) -> None:
    def write(*_: object) -> None:
        raise full

    monkeypatch.setattr("dspark.checkpoints.convert.write_checkpoint", write)
    code, _, err = run(capsys, "convert", "dspark", "--to", "dspark", "--out", str(tmp_path / "new"))
    assert code == 2 and is_one_line_error(err) and "No space left" in err and "make room" in err


def test_a_disk_that_fills_in_the_middle_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def describe(_: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # without a filename, as write() has it

    monkeypatch.setattr("dspark.checkpoints.describe", describe)
    code, _, err = run(capsys, "info", "dspark")
    assert code == 2 and is_one_line_error(err) and "make room" in err
