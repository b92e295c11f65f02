"""The estimate: right about what can be counted, and honest about what cannot."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dspark.train.estimate import _CURVE, _POSITIONS_PER_STEP, estimate, expected_tau, measure
from dspark.train.texts import Text, save_texts
from dspark.train.trainer import Trainer
from train.processes import make_trainer
from train.test_trainer import write_recipe


@pytest.fixture
def trainer(target_folder: Path, tmp_path: Path) -> Trainer:
    rows = [Text.after_prompt(torch.tensor([7, 8, *(10 + (i + j) % 12 for j in range(20))]), 2) for i in range(12)]
    (tmp_path / "texts").mkdir()
    save_texts(rows, tmp_path / "texts" / "shard-00000.safetensors")
    return make_trainer(target_folder, tmp_path / "texts", tmp_path / "run", [write_recipe(tmp_path / "dspark.toml")])


def test_lines_say_what_is_so_and_nothing_is_written(trainer: Trainer, tmp_path: Path) -> None:
    lines = list(estimate(trainer))
    count = sum(p.numel() for p in trainer.students[0].model.parameters())
    assert f"dspark: {count:,} parameters" in lines[1]
    assert "traces: 384 bytes per token" in lines[2]  # two layers and the last state, 32 wide, in float32
    assert "s per step" in lines[4] and "whole run: 12 steps" in lines[5] and "tau to expect" in lines[6]
    assert not (tmp_path / "run").exists()


def test_a_step_is_measured_with_what_it_reads(trainer: Trainer) -> None:
    measured = measure(trainer, num_steps=2)
    assert 20 <= measured.tokens_per_step <= 160 and measured.seconds_per_step > 0
    assert measured.positions_per_step > 20 and measured.peak_bytes > 10**8


def test_the_curve_is_that_of_the_shipped_drafter_and_never_falls() -> None:
    taus = [expected_tau(n * 10**5) for n in range(1, 300)]
    assert all(a.tau <= b.tau for a, b in pairwise(taus))
    assert all(1 <= t.low <= t.tau <= t.high for t in taus)
    assert expected_tau(2600 * _POSITIONS_PER_STEP).tau == pytest.approx(2.45, abs=0.05)
    assert expected_tau(1.0).tau == 1.0 and expected_tau(1.0).is_beyond_curve
    assert expected_tau(1e9).tau == pytest.approx(2.52, abs=0.05) and expected_tau(1e9).is_beyond_curve
    assert not expected_tau(5e6).is_beyond_curve
    assert _CURVE[0][0] == 400
