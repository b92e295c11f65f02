"""`dspark doctor`: it says what a checkpoint means when its config says something else, and refuses to stay silent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.command import PAIR, base_model, is_one_line_error, run

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def one_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts.txt").write_text("What drinks do you have?\n\nWhich flavors do you have?\n")


def copy_of(name: str, tmp_path: Path, **changes: Any) -> Path:
    """A copy of an embedded drafter whose config says something else."""
    folder = tmp_path / name
    shutil.copytree(PAIR / name, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def doctor(capsys: Capture, tmp_path: Path, drafter: Path | str) -> tuple[int, dict[str, Any]]:
    code, out, err = run(
        capsys, "doctor", "tiny", str(drafter), "--prompts", f"{tmp_path}/prompts.txt", "--max-tokens", "40", "--json"
    )
    assert code in (0, 1), err
    return code, json.loads(out)


def test_a_healthy_drafter(capsys: Capture, tmp_path: Path) -> None:
    code, said = doctor(capsys, tmp_path, "dflash")
    assert code == 0 and said["healthy"] and said["problems"] == []
    best, own = said["readings"][0], next(r for r in said["readings"] if r["shift"] == 0 and r["anchor_predicts"])
    assert own["tau"] > max(1.5, best["tau"] - 0.1)  # features one layer lower are much the same in so deep a target
    assert len(own["acceptance"]) == 7
    assert not any(r["shift"] == 1 for r in said["readings"]), "there is no feature above the last but one layer"
    masks_only = next(r for r in said["readings"] if not r["anchor_predicts"])
    assert masks_only["tau"] < 1.3 and len(masks_only["acceptance"]) == 6


def test_a_base_model_continues_the_prompts(capsys: Capture, tmp_path: Path) -> None:
    code, out, err = run(capsys, "doctor", base_model(tmp_path / "base"), str(PAIR / "dspark"), "--max-tokens", "16")
    assert code == 0 and "is what its config says" in out, err


def test_shifted_layer_ids(capsys: Capture, tmp_path: Path) -> None:
    """As if someone had taken 0-based ids for indices into hidden_states."""
    shifted = copy_of("dspark", tmp_path, target_layer_ids=[0, 2, 4, 5])
    code, out, _ = run(capsys, "doctor", "tiny", str(shifted))  # two prompts would leave it open
    assert code == 1
    assert "the checkpoint means: layer ids one higher" in out and "add 1 to every layer id" in out


def test_a_wrong_slot_convention(capsys: Capture, tmp_path: Path) -> None:
    """A speculators config whose sample_from_anchor was lost: vLLM would shift every token by one."""
    run(capsys, "convert", "dflash", "--to", "speculators", "--out", str(tmp_path / "s"))
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    del config["sample_from_anchor"]
    (tmp_path / "s" / "config.json").write_text(json.dumps(config))
    code, said = doctor(capsys, tmp_path, tmp_path / "s")
    assert code == 1 and said["claimed"]["anchor_predicts"] is False
    assert "set sample_from_anchor to true" in said["problems"][0]


def test_near_zero_is_refused(capsys: Capture, tmp_path: Path) -> None:
    folder = copy_of("dflash", tmp_path)
    torch.manual_seed(0)
    noise = {name: torch.randn_like(t) for name, t in load_file(folder / "model.safetensors").items()}
    save_file(noise, folder / "model.safetensors")
    code, said = doctor(capsys, tmp_path, folder)
    assert code == 1 and "under every reading" in said["problems"][0]


def test_what_does_not_fit_is_not_measured(capsys: Capture, tmp_path: Path) -> None:
    code, said = doctor(capsys, tmp_path, copy_of("dflash", tmp_path, num_target_layers=16))
    assert code == 1 and said["readings"] == []
    assert "trained on 16 target layers and this target has 14" in said["problems"][0]


def test_mistakes(capsys: Capture, tmp_path: Path) -> None:
    for argv, message in [
        (["tiny", "dflash", "--prompts", f"{tmp_path}/none"], "does not exist; expected a text file"),
        (["tiny", "tiny"], "is no drafter"),
        (["tiny", "dflash", "--prompts", f"{tmp_path}/prompts.txt", "--max-tokens", "5"], "ask for longer ones"),
    ]:
        code, out, err = run(capsys, "doctor", *argv)
        assert code == 2 and out == "" and message in err
        assert is_one_line_error(err)
