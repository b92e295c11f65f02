"""What a run writes down can be read again: by itself after a kill, and by TensorBoard."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspark.train.run_log import Curves, Table


def test_a_table_loses_nothing_but_what_comes_again(tmp_path: Path) -> None:
    table = Table(tmp_path / "train.csv")
    for step in (1, 2, 3):
        table.append({"step": step, "total": step / 2})
    with table.path.open("a") as file:
        file.write("4,2")  # a kill in the middle of a row
    assert table.rows()[-1] == {"step": 3, "total": 1.5}
    table.forget_after(2)
    table.append({"step": 3, "total": 9.0})
    assert table.rows() == [{"step": 1, "total": 0.5}, {"step": 2, "total": 1.0}, {"step": 3, "total": 9.0}]
    table.forget_after(0)
    assert not table.path.exists()


def test_tensorboard_reads_the_curves(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = Curves(tmp_path)
    for step in (25, 50):
        curves.add("validation", {"step": step, "decoded_tau": step / 10})
    found = EventAccumulator(str(tmp_path)).Reload().Scalars("validation/decoded_tau")
    assert [(event.step, event.value) for event in found] == [(25, 2.5), (50, 5.0)]
