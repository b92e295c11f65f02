"""Beliefs outlive the process, and a file that is no good costs a line in the log."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from budget.simulated_serving import World
from dspark.budget.beliefs import LiveBeliefs
from dspark.budget.kept_beliefs import KeptBeliefs, usual_path
from dspark.types import StepRecord


def learned() -> LiveBeliefs:
    live = LiveBeliefs(identity="pair")
    World(offsets=(-1.0,) * 7).serve(live, 20)
    return live


def test_a_restart_goes_on_from_what_was_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    live = learned()
    KeptBeliefs(live).save()
    assert usual_path("pair").is_relative_to(tmp_path)
    again = LiveBeliefs(identity="pair")
    KeptBeliefs(again)
    now, before = (beliefs.summary()["classes"]["everyone"] for beliefs in (again, live))
    assert now["offsets"] == before["offsets"] and now["rounds"] == before["rounds"] > 0


def test_they_are_written_now_and_then_while_serving(tmp_path: Path) -> None:
    path, live = tmp_path / "kept" / "beliefs.json", learned()
    KeptBeliefs(live, path)(StepRecord())
    assert not path.exists()
    KeptBeliefs(live, path, seconds=-1)(StepRecord())
    assert path.exists()


def test_neither_a_bad_file_nor_a_bad_disk_costs_more_than_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "beliefs.json"
    path.write_text("{}")
    kept = KeptBeliefs(LiveBeliefs(identity="pair"), path)
    assert [r.levelno for r in caplog.records] == [logging.WARNING] and "delete it" in caplog.text
    caplog.clear()
    kept.path = path / "below a file" / "beliefs.json"
    kept.save()
    kept.save()
    assert len(caplog.records) == 1 and "cannot be kept" in caplog.text
