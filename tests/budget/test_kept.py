"""Beliefs and costs outlive the process, and a file that is no good costs a line in the log."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from budget.simulated_serving import World
from dspark.budget.beliefs import LiveBeliefs
from dspark.budget.capacity import Capacity
from dspark.budget.capacity import usual_path as capacity_path
from dspark.budget.kept import Kept, keep_beliefs, keep_costs, usual_path
from dspark.types import Load, StepRecord


def learned() -> LiveBeliefs:
    live = LiveBeliefs(identity="pair")
    World(offsets=(-1.0,) * 7).serve(live, 20)
    return live


def test_a_restart_goes_on_from_what_was_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    live = learned()
    keep_beliefs(live).save()
    assert usual_path("pair").is_relative_to(tmp_path)
    again = LiveBeliefs(identity="pair")
    keep_beliefs(again)
    now, before = (beliefs.summary()["classes"]["everyone"] for beliefs in (again, live))
    assert now["offsets"] == before["offsets"] and now["rounds"] == before["rounds"] > 0


def test_the_next_engine_of_a_kind_knows_what_steps_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    about = {"hardware": "this", "target": "tiny"}
    capacity = Capacity(about)
    for _ in range(5):
        capacity.observe(StepRecord(load=Load(1), num_tokens=1, seconds={"target": 0.25}))
    keep_costs(capacity).save()
    again = Capacity.load_or_new(capacity_path(about), about)
    assert again.seconds(np.array([1]), 1, 0)[0] == pytest.approx(0.25, rel=0.1)
    other = {**about, "target": "other"}
    assert not Capacity.load_or_new(capacity_path(other), other).is_known


def test_they_are_written_now_and_then_while_serving(tmp_path: Path) -> None:
    path, live = tmp_path / "kept" / "beliefs.json", learned()
    keep_beliefs(live, path)(StepRecord())
    assert not path.exists()
    Kept("beliefs", live.save, path, seconds=-1)(StepRecord())
    assert path.exists()


def test_neither_a_bad_file_nor_a_bad_disk_costs_more_than_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "beliefs.json"
    path.write_text("{}")
    kept = keep_beliefs(LiveBeliefs(identity="pair"), path)
    assert [r.levelno for r in caplog.records] == [logging.WARNING] and "delete it" in caplog.text
    caplog.clear()
    kept.path = path / "below a file" / "beliefs.json"
    kept.save()
    kept.save()
    assert len(caplog.records) == 1 and "cannot be kept" in caplog.text
