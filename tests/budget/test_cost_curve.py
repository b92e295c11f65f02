"""What the curve must learn, and what it must not be taught."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize

from dspark.budget.cost_curve import CostCurve, nonnegative_least_squares, rising


def straight(size, requests, context):
    return 1.5e-3 + 2e-4 * size + 3e-5 * requests + 2e-9 * context * size


def stairs(size, requests, context):
    return 1e-3 + 5e-4 * np.ceil(size / 8)


def learned(law, noise: float = 0.05, seed: int = 0, repeats: int = 5) -> CostCurve:
    rng, curve = np.random.default_rng(seed), CostCurve()
    for _ in range(repeats):
        for requests in (1, 2, 4, 8, 16, 32):
            for per_request in (1, 2, 4, 8):
                for context in (64, 512):
                    size = requests * per_request
                    seconds = law(size, requests, requests * context) * rng.lognormal(0, noise)
                    curve.observe(size, requests, requests * context, seconds)
    return curve


def predicted(curve, size, requests, context) -> float:
    return float(curve.seconds(np.array([size]), requests, context)[0])


@pytest.mark.parametrize("seed", range(5))
def test_least_squares_are_those_of_scipy(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.random((30, 12)) * (rng.random((30, 12)) < 0.7), rng.random(30) - 0.2
    exact, _ = scipy.optimize.nnls(np.vstack([x, 1e-3 * np.eye(12)]), np.append(y, np.zeros(12)))
    gram, moment = x.T @ x + 1e-6 * np.eye(12), x.T @ y
    for start in (np.zeros(12), rng.random(12), exact):
        assert nonnegative_least_squares(gram, moment, start) == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_rising_values_are_those_of_scipy(seed):
    rng = np.random.default_rng(seed)
    values, weights = rng.normal(size=20).cumsum(), rng.random(20) + 1e-3
    assert rising(values, weights) == pytest.approx(scipy.optimize.isotonic_regression(values, weights=weights).x)


def test_old_steps_give_way_to_new_ones_next_to_them():
    """Cheaper steps of a size that is seen now say that smaller ones cannot cost what they did long ago."""
    curve = CostCurve()
    for _ in range(9):
        curve.observe(16, 8, 800, 8e-3)
    for _ in range(400):
        curve.observe(19, 8, 800, 4e-3)
    assert predicted(curve, 19, 8, 800) == pytest.approx(4e-3, rel=0.1)
    assert predicted(curve, 16, 8, 800) == pytest.approx(4e-3, rel=0.1)


def test_it_learns_what_it_saw_and_what_lies_between():
    curve = learned(straight)
    for size, requests, context in [
        (1, 1, 100),
        (6, 1, 700),
        (12, 4, 1000),
        (48, 12, 4000),
        (32, 32, 6000),
        (400, 64, 9000),
    ]:
        assert predicted(curve, size, requests, context) == pytest.approx(straight(size, requests, context), rel=0.08)


def test_it_never_falls_with_tokens_or_context():
    for law in (straight, stairs):
        curve = learned(law, noise=0.3)
        for requests in (1, 3, 32):
            for context in (0, 5000):
                seconds = curve.seconds(np.arange(1, 600), requests, context)
                assert (np.diff(seconds) >= -1e-15).all() and (seconds > 0).all()
            assert predicted(curve, 64, requests, 9000) >= predicted(curve, 64, requests, 4500) * (1 - 1e-12)


def test_stairs_stay_stairs():
    curve = CostCurve()
    for _ in range(3):
        for size in range(1, 33):
            curve.observe(size, 1, 64, stairs(size, 1, 64))
    flat, up = [predicted(curve, b, 1, 64) - predicted(curve, a, 1, 64) for a, b in ((1, 8), (8, 10))]
    assert flat < 0.2 * up and up > 3e-4


def test_it_follows_a_machine_that_slows_down_and_speeds_up():
    """Half the speed, everywhere at once, also where no step has been since; within 200 steps and to 10 %."""
    curve = learned(straight)
    for factor in (2.0, 1.0, 0.5):
        for step in range(200):
            size, requests = [(8, 1), (4, 1), (32, 8)][step % 3]
            curve.observe(size, requests, 100 * requests, factor * straight(size, requests, 100 * requests))
        for size, requests in [(8, 1), (32, 8), (32, 32), (200, 32)]:
            expected = factor * straight(size, requests, 100 * requests)
            assert predicted(curve, size, requests, 100 * requests) == pytest.approx(expected, rel=0.1)


def test_a_machine_whose_speed_wavers_is_followed_without_fitting_again_and_again(monkeypatch):
    """All steps change alike, which the speed tells; the terms are as right as before."""
    rng, curve, fits = np.random.default_rng(0), learned(straight), []
    fit = CostCurve.fit
    monkeypatch.setattr(CostCurve, "fit", lambda self: (fits.append(self.num_observed), fit(self)))
    speed, errors = 1.0, []
    for step in range(1200):
        if step % 40 == 0:
            speed = rng.uniform(0.8, 1.25)
        size = int(rng.integers(1, 9))
        errors.append(abs(curve.seconds_of(size, 1, 100) / speed / straight(size, 1, 100) - 1))
        curve.observe(size, 1, 100, speed * straight(size, 1, 100) * rng.lognormal(0, 0.05))
    assert np.median(errors) < 0.10
    assert len(fits) <= 12


def test_rare_slow_steps_and_broken_clocks_teach_nothing():
    curve = learned(straight)
    before = predicted(curve, 8, 1, 100)
    for step in range(400):
        seconds = straight(8, 1, 100) * (10 if step % 20 == 0 else 1)
        curve.observe(8, 1, 100, seconds)
        if step % 10 == 0:
            for nonsense in (0.0, -1e9, float("nan"), float("inf")):
                curve.observe(8, 1, 100, nonsense)
        assert predicted(curve, 8, 1, 100) == pytest.approx(before, rel=0.1)
    assert curve.speed == 1.0


@pytest.mark.parametrize("num_before", [1, 2, 40])
def test_a_clock_that_leaps_is_not_believed_but_a_machine_that_stays_slow_is(num_before):
    curve = CostCurve()
    for _ in range(num_before):
        curve.observe(8, 1, 100, 3e-3)
    for size in (8, 1, 16):
        curve.observe(size, 1, 100, 7200.0)
        curve.observe(8, 1, 100, 3e-3)
        assert (curve.seconds(np.array([1, 8, 16]), 1, 100) < 0.02).all()
    for _ in range(60):
        curve.observe(8, 1, 100, 0.3)
    assert predicted(curve, 8, 1, 100) == pytest.approx(0.3, rel=0.2)


def test_memory_is_bounded():
    curve, rng = CostCurve(), np.random.default_rng(0)
    for _ in range(3000):
        size, requests = int(rng.integers(1, 4000)), int(rng.integers(1, 300))
        curve.observe(max(size, requests), requests, int(rng.integers(0, 100_000)), 1e-3)
    assert len(curve._places) <= 256 and len(curve._tables) < 300


def test_it_comes_back_from_json():
    curve = learned(straight)
    again = CostCurve.from_json(curve.as_json())
    sizes = np.arange(1, 100)
    assert again.seconds(sizes, 8, 900) == pytest.approx(curve.seconds(sizes, 8, 900), rel=0.02)
    for broken in ({}, {"places": [[1, 1, 0, []]]}, {"places": [[1, 1, 0, [-1.0]]]}, {"places": [["x"]]}):
        with pytest.raises((ValueError, TypeError, KeyError)):
            CostCurve.from_json(broken)


def test_what_a_file_says_of_a_size_is_soon_put_right():
    """It was written while the machine had other work: a size that looks dear is hardly ever tried again."""
    before, rng = learned(straight), np.random.default_rng(0)
    for _ in range(18):
        before.observe(8, 1, 64, 4 * straight(8, 1, 64))
    curve = CostCurve.from_json(before.as_json())
    for step in range(600):
        size = 8 if step in (150, 300, 450) else int(rng.integers(1, 8))
        curve.observe(size, 1, 64, straight(size, 1, 64) * rng.lognormal(0, 0.05))
    assert predicted(curve, 8, 1, 64) == pytest.approx(straight(8, 1, 64), rel=0.15)


def test_one_step_is_enough_to_begin_with():
    curve = CostCurve()
    assert not curve.is_known and (curve.seconds(np.arange(3), 1, 0) == 1).all()
    curve.observe(8, 1, 100, 3e-3)
    assert predicted(curve, 8, 1, 100) == pytest.approx(3e-3, rel=0.35)
    curve.observe(1, 1, 100, 2e-3)
    assert predicted(curve, 8, 1, 100) > predicted(curve, 1, 1, 100)


def test_a_size_costs_alone_what_it_costs_among_others():
    curve, sizes = learned(stairs), np.array([0, 1, 5, 8, 9, 13, 100, 700, 8192, 20_000])
    for requests, context in ((1, 0), (3, 700), (32, 9000)):
        alone = [curve.seconds_of(int(size), requests, context) for size in sizes]
        assert curve.seconds(sizes, requests, context) == pytest.approx(alone)


def test_what_a_fit_says_is_worked_out_once_for_all_sizes():
    curve = learned(straight)
    curve.fit()
    for size in (1, 8, 64, 512, 4096):
        curve.seconds(np.arange(1, size + 1), 8, 900)
        curve.seconds_of(size, 8, 900)
    assert len(curve._tables) == 1
