"""`dspark info`: what a folder is, and whether two fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cli.command import PAIR, is_one_line_error, run, run_json

Capture = pytest.CaptureFixture[str]


def test_a_target_and_its_drafters_are_described(capsys: Capture) -> None:
    target = run_json(capsys, "info", "tiny")
    assert target["kind"] == "target"
    assert target["parameters"] > 1_000_000
    drafter = run_json(capsys, "info", "dspark")
    assert drafter == run_json(capsys, "info", str(PAIR / "dspark"))
    assert drafter["kind"] == "drafter"
    assert drafter["block_size"] == 7
    assert drafter["confidence_head"] is True
    assert drafter["vocab_size"] == target["vocab_size"]


def test_a_table_for_people(capsys: Capture) -> None:
    code, out, _ = run(capsys, "info", str(PAIR / "dspark"))
    assert code == 0
    facts = dict(line.split("  ", 1) for line in out.splitlines())
    assert facts["kind"].strip() == "drafter"
    assert "\x1b" not in out


@pytest.mark.parametrize("name", ["dspark", "dflash", "eagle3", "draft"])
def test_the_embedded_drafters_fit_the_embedded_target(capsys: Capture, name: str) -> None:
    code, out, _ = run(capsys, "info", name, "--target", "tiny")
    assert code == 0
    assert "fits tiny" in out


def test_a_drafter_for_another_target_does_not_fit(capsys: Capture, tmp_path: Path) -> None:
    shutil.copytree(PAIR / "dspark", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 8}))
    code, out, _ = run(capsys, "info", str(tmp_path), "--target", "tiny")
    assert code == 1
    assert "does not fit tiny" in out
    assert str(config["vocab_size"] + 8) in out


@pytest.mark.parametrize("verb", [["info"], ["doctor", "tiny"]])
def test_ngrams_have_no_checkpoint(capsys: Capture, verb: list[str]) -> None:
    code, _, err = run(capsys, *verb, "ngram")
    assert code == 2 and "without a checkpoint" in err


@pytest.mark.parametrize("name", ["./no/such/folder", "empty", "broken"])
def test_what_cannot_be_read_is_a_mistake(capsys: Capture, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    if name in ("empty", "broken"):
        folder.mkdir()
    if name == "broken":
        (folder / "config.json").write_text("{")
    code, out, err = run(capsys, "info", str(folder))
    assert code == 2
    assert out == ""
    assert is_one_line_error(err)
