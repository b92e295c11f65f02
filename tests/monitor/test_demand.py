"""Forecasts of demand, on traffic whose law is known."""

from __future__ import annotations

import numpy as np
import pytest

from dspark.errors import InvalidRequest
from dspark.monitor.demand import forecast, pinball


def traffic(num_hours: int, seed: int = 0, noise: float = 0.15) -> np.ndarray:
    """A daily curve, noise, and a level that wanders from day to day."""
    rng = np.random.default_rng(seed)
    hours = np.arange(num_hours)
    levels = np.exp(np.cumsum(0.05 * rng.standard_normal(num_hours // 24 + 1)))[hours // 24]
    curve = 2 + np.sin(2 * np.pi * hours / 24)
    return levels * curve * np.exp(noise * rng.standard_normal(num_hours))


def test_a_pure_daily_curve_is_continued():
    hours = np.arange(24 * 5)
    demand = forecast(2 + np.sin(2 * np.pi * hours / 24), 24)
    assert demand.median == pytest.approx(2 + np.sin(2 * np.pi * hours[:24] / 24))
    assert demand.upper == pytest.approx(demand.median)


def test_history_that_ends_in_the_middle_of_a_day_keeps_its_phase():
    hours = np.arange(24 * 5 + 7)
    demand = forecast(2 + np.sin(2 * np.pi * hours / 24), 30)
    assert demand.median == pytest.approx(2 + np.sin(2 * np.pi * np.arange(len(hours), len(hours) + 30) / 24))


def test_a_new_level_is_believed_soon():
    hours = np.arange(24 * 6)
    rates = (2 + np.sin(2 * np.pi * hours / 24)) * np.where(hours < 24 * 4, 1.0, 2.0)
    assert 1.7 < forecast(rates).median.mean() / rates[:24].mean() < 2


def test_weekends_are_told_apart_after_three_weeks():
    hours = np.arange(24 * 7 * 4)
    rates = np.where(hours // 24 % 7 < 5, 4.0, 1.0)
    assert forecast(rates, 168).median == pytest.approx(rates[:168])


def test_it_beats_yesterdays_curve_and_its_quantile_holds():
    below, ours, naive = [], [], []
    for seed in range(12):
        rates = traffic(24 * 15, seed)
        past, future = rates[:-24], rates[-24:]
        demand = forecast(past, 24, quantile=0.9)
        below.append((future <= demand.upper).mean())
        ours.append(pinball(future, demand.median, 0.5))
        naive.append(pinball(future, past[-24:], 0.5))
        assert demand.pinball < demand.naive_pinball
    assert np.mean(ours) < 0.9 * np.mean(naive)
    assert 0.83 < np.mean(below) < 0.96


def test_pinball_is_least_at_the_quantile():
    values = np.random.default_rng(0).standard_normal(20000)
    losses = {guess: pinball(values, np.full(20000, guess), 0.9) for guess in (0.9, 1.2816, 1.7)}
    assert min(losses, key=losses.get) == 1.2816


@pytest.mark.parametrize("rates", [np.ones(30), np.zeros(100), np.full(100, np.nan), -np.ones(100)])
def test_rates_that_say_nothing_are_refused(rates):
    with pytest.raises(InvalidRequest):
        forecast(rates)
