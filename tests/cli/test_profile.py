"""`dspark profile`: a grid of measured steps that later runs find."""

from __future__ import annotations

import json

import pytest

from dspark.budget.capacity import Capacity
from dspark.cli.main import main
from dspark.engine.engine import Engine
from dspark.engine.measuring import Grid, measure
from engine.models import OracleDrafter, random_target


@pytest.fixture
def target(tmp_path):
    return random_target(tmp_path / "target")


def test_an_engine_is_left_as_it_was(target):
    engine = Engine(target, OracleDrafter([], length=3), "auto", capacity=Capacity({"of": "a test"}))
    scheduler, guard = engine.choosing.scheduler, engine.drafting.guard
    num_steps = measure(engine, Grid(requests=(1, 3, 1000), contexts=(8, 10_000), repeats=3))
    assert num_steps == 2 * 2 * 3 * 3  # 1000 requests are more than the engine runs; long contexts are cut
    assert engine.capacity.decoding.num_observed >= num_steps
    assert engine.choosing.scheduler is scheduler and engine.drafting.guard is guard is not None
    assert not engine.has_work and target.num_free_slots == target.cache.limit


def test_a_saved_capacity_is_found_by_the_next_engine(target, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    options = ["--target", str(tmp_path / "target"), "--drafter", "ngram", "--dtype", "float32", "--device", "cpu"]
    sps = tmp_path / "sps.json"
    assert main(["profile", *options, "--requests", "1,2", "--contexts", "16", "--sps", str(sps), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["steps"] > 10 and [row["requests"] for row in said["rows"]] == [1, 2]
    assert json.loads(sps.read_text())["max_batch_tokens"] == 16

    from dspark import load_drafter, load_target

    target = load_target(str(tmp_path / "target"), dtype="float32", device="cpu")
    engine = Engine(target, load_drafter("ngram", target))
    assert engine.capacity.is_known
    assert not Engine(target).capacity.is_known  # another drafter, another file


def test_the_table_is_for_people(target, tmp_path, capsys):
    out = tmp_path / "capacity.json"
    options = ["--target", str(tmp_path / "target"), "--dtype", "float32", "--device", "cpu", "--requests", "1"]
    assert main(["profile", *options, "--contexts", "16", "--output", str(out)]) == 0
    shown = capsys.readouterr()
    assert "verify 0" in shown.out and str(out) in shown.err and out.exists()


def test_the_table_is_of_contexts_that_could_be_read(target, tmp_path, capsys):
    options = ["--target", str(tmp_path / "target"), "--dtype", "float32", "--device", "cpu", "--requests", "1"]
    out = ["--output", str(tmp_path / "capacity.json"), "--json"]
    assert main(["profile", *options, "--contexts", "16,5000,9000", *out]) == 0
    assert [row["context"] for row in json.loads(capsys.readouterr().out)["rows"]] == [16, 256]


@pytest.mark.parametrize("bad", ["", "0", "1,x", "-1"])
def test_bad_numbers_are_refused(bad, capsys):
    assert main(["profile", "--requests", bad]) == 2
    assert "--requests takes numbers" in capsys.readouterr().err


def test_nothing_measured_is_not_kept(target, tmp_path, capsys):
    out = tmp_path / "capacity.json"
    options = ["--target", str(tmp_path / "target"), "--dtype", "float32", "--device", "cpu", "--output", str(out)]
    assert main(["profile", "--seconds", "0"]) == 2
    assert main(["profile", *options, "--requests", "100000", "--contexts", "200"]) == 2
    assert "no step of 100000 requests" in capsys.readouterr().err and not out.exists()
