"""`dspark convert`: the embedded drafters, there and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
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
