"""The load benchmark's loops over a tiny model, and the arithmetic of its tables."""

from __future__ import annotations

import pytest

from benchmarks.load import parse
from benchmarks.load_loops import ClosedLoop, Slice, Workload, open_loop
from benchmarks.load_report import cell, verdicts
from dspark.engine.engine import Engine
from engine.models import random_target

WORK = dict(prompts=[[3, 1, 4], [1, 5]], seed=0, shortest=4, longest=8)


def slices(policy: str, *speeds: float) -> dict[tuple[str, int], list[Slice]]:
    counts = dict(seconds=1.0, decoded=10, verified=20, accepted=5)
    return {(policy, 4): [Slice(tokens=s, work=[(s, 0, 1.0)], **counts) for s in speeds]}


def test_ratios_are_of_the_same_repeat():
    every = slices("off", 100, 50) | slices("fixed:3", 150, 75) | slices("auto", 200, 100)
    cells = [cell(policy, n, own, every) for (policy, n), own in every.items()]
    assert [c.ratio for c in cells] == [pytest.approx(1), pytest.approx(1.5), pytest.approx(2)]
    assert all(c.ratio_within == pytest.approx(0, abs=1e-9) for c in cells)  # twice as fast in either repeat
    assert (cells[1].budget, cells[1].tau, cells[1].wasted) == (2.0, 1.5, 0.75)
    each, sweep = verdicts(cells)
    assert "auto at 1.333 of the best fixed choice (fixed:3)" in each and "+33.3 % against fixed:3" in sweep


def test_a_long_prompt_is_work_in_whichever_turn_it_falls():
    def turn(*steps: tuple[int, int, float]) -> Slice:
        return Slice(seconds=sum(s for *_, s in steps), tokens=sum(t for t, *_ in steps), work=list(steps))

    decoding, reading = [(8, 0, 0.01)] * 10, (8, 500, 0.11)  # 10 ms for eight tokens, and 100 for 500 of a prompt
    faster = [(tokens, prompt, seconds / 2) for tokens, prompt, seconds in (*decoding, reading)]
    every = {
        ("off", 8): [turn(*decoding, reading), turn(*decoding, *decoding)],
        ("auto", 8): [turn(*faster[:-1]), turn(*faster)],
    }
    auto = cell("auto", 8, every["auto", 8], every)
    assert auto.ratio == pytest.approx(2) and auto.ratio_within == pytest.approx(0, abs=1e-9)


def test_whole_batches_are_compared_with_whole_batches():
    every = slices("off", 100) | slices("batch: off", 50) | slices("batch: vllm compiled", 150)
    assert cell("batch: vllm compiled", 4, every["batch: vllm compiled", 4], every).ratio == pytest.approx(3)


def test_turns_of_a_closed_loop_are_one_stream_of_requests(tmp_path):
    target = random_target(tmp_path)
    engines = [Engine(target), Engine(target)]
    loops = [ClosedLoop(engine, Workload(**WORK), num_requests=3) for engine in engines]
    first, second = ([loop.run(until) for loop in loops] for until in (30, 50))
    assert [s.tokens for s in first] == [30, 30] and [s.tokens for s in second] == [21, 21]  # 3 or 2 in a step
    at_once = ClosedLoop(Engine(target), Workload(**WORK), num_requests=3)
    at_once.run(50)
    assert [r.tokens for r in loops[0].requests] == [r.tokens for r in at_once.requests]  # nothing was begun anew
    for loop in (*loops, at_once):
        loop.end()
        assert not loop.engine.has_work
    assert target.num_free_slots == target.cache.limit


def test_open_loops_leave_nothing_behind(tmp_path):
    target = random_target(tmp_path)
    engine = Engine(target)
    found = open_loop(engine, Workload(**WORK), per_second=1e4, seconds=0.2)  # far more than it can serve
    assert found.num_unfinished > 0
    assert all(4 <= r.num_tokens <= 8 and 0 < r.first_token_seconds <= r.seconds for r in found.served)
    assert not engine.has_work and target.num_free_slots == target.cache.limit


def test_quick_is_quick_and_off_takes_part():
    options = parse(["--quick", "--policies", "auto"])
    assert options.policies == ["off", "auto"] and options.minutes < 3 and not options.poisson
