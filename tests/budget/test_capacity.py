"""Capacity files: what is kept, what is refused, and what other engines read."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from dspark.budget.capacity import Capacity, usual_path
from dspark.errors import InvalidConfiguration
from dspark.types import Load, StepRecord

HERE = {"hardware": "a processor", "target": "tiny 7", "threads": "1"}


def step(tokens: int, requests: int, context: int, prompts: int = 0, asked: int = 0, unread: int = 0) -> StepRecord:
    seconds = {"target": 1e-3 + 1e-4 * tokens, "draft": 5e-4 + 1e-5 * asked, "verify": 1e-4}
    load = Load(requests, requests, context, num_prompt_tokens=prompts)
    ids = list(range(requests))
    return StepRecord(
        request_ids=ids, load=load, num_tokens=tokens, num_asked=asked, num_unread=unread, seconds=seconds
    )


@pytest.fixture
def capacity():
    made = Capacity(HERE)
    for _ in range(5):
        for requests in (1, 4, 16):
            for per_request in (1, 4, 8):
                made.observe(step(requests * per_request, requests, 100 * requests, asked=requests))
    return made


def seconds(capacity, tokens, requests=1, reading=False) -> float:
    return float(capacity.seconds(np.array([tokens]), requests, 100 * requests, reading)[0])


def test_drafting_is_told_apart_from_the_rest_of_the_step(capacity):
    assert seconds(capacity, 8) == pytest.approx(1.1e-3 + 8e-4, rel=0.05)
    assert capacity.draft_seconds(4, 400) == pytest.approx(5.4e-4, rel=0.05)
    assert capacity.draft_seconds(0, 0) == 0 and Capacity().draft_seconds(4, 400) == 0


def test_prompts_have_a_curve_of_their_own(capacity):
    before = seconds(capacity, 8)
    for _ in range(5):
        capacity.observe(step(200, 2, 100, prompts=190, asked=1, unread=200))
    assert seconds(capacity, 8) == before
    assert seconds(capacity, 200, 2, reading=True) == pytest.approx(2.11e-2, rel=0.05)
    assert capacity.draft_seconds(4, 400) == pytest.approx(5.4e-4, rel=0.05)


def test_a_file_comes_back(capacity, tmp_path):
    path = tmp_path / "new" / "capacity.json"
    capacity.save(path)
    again = Capacity.load(path, HERE)
    for tokens, requests in [(1, 1), (8, 1), (64, 16)]:
        assert seconds(again, tokens, requests) == pytest.approx(seconds(capacity, tokens, requests), rel=0.02)
    assert again.draft_seconds(4, 400) == pytest.approx(capacity.draft_seconds(4, 400), rel=0.02)
    assert not list(path.parent.glob("*.tmp"))


def test_a_file_from_elsewhere_is_refused_or_measured_anew(capacity, tmp_path, caplog):
    path = tmp_path / "capacity.json"
    capacity.save(path)
    there = {**HERE, "hardware": "another processor"}
    with pytest.raises(InvalidConfiguration, match="hardware a processor, here another processor"):
        Capacity.load(path, there)
    anew = Capacity.load_or_new(path, there)
    assert not anew.is_known and anew.fingerprint == there
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"format": 1, "fingerprint": {}}', "null", '{"format": 99}', "\x00\xff"],
)
def test_a_corrupt_file_is_refused_or_measured_anew(text, tmp_path, caplog):
    path = tmp_path / "capacity.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidConfiguration, match="not a capacity file"):
        Capacity.load(path, HERE)
    assert not Capacity.load_or_new(path, HERE).is_known
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("place", "value"), [(3, [-1.0]), (2, math.nan), (2, 1e308), (0, 1e308), (0, float)])
def test_numbers_that_no_clock_gave_are_refused(capacity, tmp_path, place, value):
    path = tmp_path / "capacity.json"
    capacity.save(path)
    state = json.loads(path.read_text())
    state["decoding"]["places"][0][place] = 10**400 if value is float else value  # too large to be one
    path.write_text(json.dumps(state))
    with pytest.raises(InvalidConfiguration, match="not a capacity file"):
        Capacity.load(path, HERE)


def test_no_file_is_no_news(tmp_path, caplog):
    assert not Capacity.load_or_new(tmp_path / "none.json", HERE).is_known
    assert not caplog.records
    with pytest.raises(InvalidConfiguration, match="cannot be read"):
        Capacity.load(tmp_path / "none.json", HERE)


def test_the_file_of_another_engine(capacity):
    table = capacity.as_sps(largest=64, requests=8, context_tokens=800)
    assert table["max_batch_tokens"] == table["sample_batch_tokens"][-1] == 64
    assert table["sample_batch_tokens"] == sorted(set(table["sample_batch_tokens"]))
    rates = table["sample_steps_per_sec"]
    assert rates == sorted(rates, reverse=True) and len(rates) == len(table["sample_batch_tokens"])
    assert rates[-1] == pytest.approx(1 / seconds(capacity, 64, 8), rel=0.05)


def test_one_place_for_each_kind_of_engine(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = usual_path(HERE)
    assert path.is_relative_to(tmp_path) and path == usual_path(dict(reversed(HERE.items())))
    assert path != usual_path({**HERE, "threads": "2"})


def test_what_was_noted_while_nobody_asked_is_learned_when_somebody_does():
    capacity, asked_always = Capacity(), Capacity()
    for n in range(3000):
        asked_always.seconds_of(4, 4, 400)
        for each in (capacity, asked_always):
            each.observe(step(4 + n % 3, 4, 100))
    assert capacity.decoding.num_observed == 0 and asked_always.decoding.num_observed > 2900
    assert len(capacity._waiting) < 1500  # it is bounded
    sizes = np.arange(4, 7)
    assert capacity.seconds(sizes, 4, 400) == pytest.approx(asked_always.seconds(sizes, 4, 400), rel=0.02)
    assert capacity.is_known and not capacity._waiting
