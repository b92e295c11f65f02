"""Runs against runs: planted differences are found, equal runs are not told apart, gates close when they should."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest
from scipy.stats import t

from dspark.errors import InvalidConfiguration, InvalidRequest
from dspark.evaluate.comparison import USUAL_GATE, Requirement, choose, compare, failures, read_gate
from dspark.evaluate.prompts import Sample
from dspark.evaluate.runs import Run, Setup, Unit, work_of
from dspark.evaluate.statistics import _t_quantile, ratio_of_rates
from dspark.types import SamplingParams


def timed(name: str, slower: float = 1.0, num_units: int = 60, seed: int = 0, noise: float = 0.05, **facts) -> Run:
    """Units differ much from one another; the same units take both runs alike, but for some noise."""
    lengths = np.random.default_rng(99).uniform(20, 100, num_units)
    rng = np.random.default_rng(seed)
    units = [
        Unit(
            "math" if i % 2 else "chat",
            round(n),
            round(n),
            round(n / 2),
            "same",
            [slower * n / 100 * rng.lognormal(0, noise)],
        )
        for i, n in enumerate(lengths)
    ]
    return Run(name, "work", {"hardware": "here", **facts}, units)


def test_t_quantiles_are_those_of_scipy():
    for degrees in (4, 9, 30):
        assert _t_quantile(degrees, 0.95) == pytest.approx(t.ppf(0.975, degrees), rel=0.01)


def test_an_interval_misses_equal_rates_one_time_in_twenty():
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(400):
        tokens = rng.uniform(20, 100, 12)
        a, b = (np.stack([tokens, tokens * rng.lognormal(0, 0.15, 12)], 1) for _ in range(2))
        interval = ratio_of_rates(a, b)
        missed += not interval.low <= 1 <= interval.high
    assert 8 <= missed <= 30  # 20 expected


def test_swapping_the_two_gives_the_reciprocal():
    a, b = ([(u.num_tokens, u.usual_seconds) for u in timed("", seed=s).units] for s in (1, 2))
    there, back = ratio_of_rates(a, b), ratio_of_rates(b, a)
    assert (back.value, back.low, back.high) == pytest.approx(
        (1 / there.value, 1 / there.high, 1 / there.low), rel=0.01
    )


def test_a_twentieth_is_seen_and_its_size_told():
    found = compare(timed("before"), timed("after", slower=1 / 1.05, seed=1))
    assert found.verdict == "faster" and found.speed.low < 1.05 < found.speed.high
    assert set(found.speed_by_domain) == {"math", "chat"}
    assert compare(timed("before"), timed("after", seed=1)).verdict == "undecided"
    assert compare(timed("before"), timed("after", slower=1.05, seed=1)).verdict == "slower"


def test_the_median_of_repeats_forgets_a_stall():
    unit = Unit("all", 10, 10, 5, "", [1.0, 60.0, 1.1])
    assert unit.usual_seconds == 1.1


def test_the_best_is_named_only_if_it_is():
    clear = choose([timed("a"), timed("b", slower=0.8, seed=1), timed("c", slower=1.2, seed=2)])
    assert (clear.best, clear.rivals) == ("b", ()) and clear.lead.low > 1
    close = choose([timed("a"), timed("b", slower=0.8, seed=1), timed("c", slower=0.801, seed=2)])
    assert {close.best, *close.rivals} == {"b", "c"}


def test_the_usual_gate_closes_on_a_tenth_and_not_on_noise():
    assert failures(compare(timed("a"), timed("b", slower=1.12, seed=1)), USUAL_GATE)
    noisy = [compare(timed("a", noise=0.3, seed=100 + s), timed("b", noise=0.3, seed=s)) for s in range(15)]
    assert any(found.speed.value < 0.95 for found in noisy)
    assert not any(failures(found, USUAL_GATE) for found in noisy)
    worse = timed("b", seed=1)
    for unit in worse.units:
        unit.num_passes = round(1.1 * unit.num_passes)
    (reason,) = failures(compare(timed("a"), worse), USUAL_GATE)
    assert reason.startswith("tau of b is 0.9")


def test_other_texts_close_a_gate_that_asks():
    other = timed("b", seed=1)
    other.units[3].texts = "another"
    gate = {"same_text": Requirement(at_least=1.0)}
    assert failures(compare(timed("a"), other), gate) and not failures(compare(timed("a"), timed("b")), gate)


def test_seconds_of_another_machine_are_not_judged():
    found = compare(timed("a"), timed("b", slower=3.0, threads="8"))
    assert found.speed is None and not failures(found, {"speed": Requirement(at_least=1.0)})


def test_a_kept_run_outlives_parameters_that_were_not_there_yet():
    @dataclass(frozen=True)
    class LaterParams(SamplingParams):
        later: float = 0.0

    samples = [Sample("a"), Sample("b")]
    now, later = (
        [work_of(samples, of(seed=seed), 1, False) for seed in (3, 4)] for of in (SamplingParams, LaterParams)
    )
    assert now == later and now[0] != now[1]
    assert work_of(samples, LaterParams(seed=3, later=1.0), 1, False) not in now


def test_other_work_is_refused():
    other = timed("b")
    other.work = "other"
    with pytest.raises(InvalidRequest, match="same prompts"):
        compare(timed("a"), other)


def test_a_run_is_kept_whole(tmp_path):
    before = timed("a")
    before.save(tmp_path / "run.json")
    assert Run.load(tmp_path / "run.json") == before
    (tmp_path / "run.json").write_text(json.dumps({"format": 1, "units": 3}))
    with pytest.raises(InvalidRequest, match="no saved run"):
        Run.load(tmp_path / "run.json")


def test_gates_are_read_and_mistakes_in_them_refused(tmp_path):
    path = tmp_path / "gate.toml"
    path.write_text("[speed]\nat_least = 1.2\n[tau]\nmax_drop = 0.1")
    assert read_gate(path) == {"speed": Requirement(at_least=1.2), "tau": Requirement(max_drop=0.1)}
    for text in ("[sped]\nat_least = 1", "[speed]\nmin = 1", "[speed]\nat_least = 'x'", "speed"):
        path.write_text(text)
        with pytest.raises(InvalidConfiguration, match="no gate"):
            read_gate(path)


@pytest.mark.parametrize("text", ["", ",scheduler=auto", "dspark,length=3", "dspark,auto"])
def test_setups_that_say_nothing_are_refused(text):
    with pytest.raises(InvalidConfiguration):
        Setup.parse(text)
    assert Setup.parse("dspark,scheduler=fixed:3").scheduler == "fixed:3"
