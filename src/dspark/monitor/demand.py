"""How many requests will come? Tomorrow is like the days before at the same hour, at the level of the last one.

Quantiles come from how wrong the same forecast would have been before (rolling origin), so they are as wide as the
traffic is moody, and the same look back says whether the forecast beats yesterday's curve.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dspark.errors import InvalidRequest

Floats = NDArray[np.float64]
_DAY = 24
_WEEK = 168
_FADING = 0.7  # weight of a season relative to the one after it
_LEVEL_TRUST = 0.5  # of the last season's level against those before
_FLOOR = 0.05  # of the mean rate, added to both sides of ratios: an hour with few requests is not infinitely wrong


@dataclass(frozen=True)
class Demand:
    """Requests per second in the hours to come.

    median, upper  [h]; a share `quantile` of hours stays below `upper`
    pinball        loss of `upper` over past hours, and that of yesterday's curve with as honest a margin
    """

    median: Floats
    upper: Floats
    quantile: float
    pinball: float
    naive_pinball: float


def forecast(rates: Floats, num_hours: int = _DAY, quantile: float = 0.95) -> Demand:
    """From hourly rates [n], oldest first, two days of them at least. From three weeks on, weekdays are told apart."""
    if len(rates) < 2 * _DAY + 1:
        raise InvalidRequest(f"a forecast needs hourly rates of more than two days; got {len(rates)} hours")
    if not (np.isfinite(rates).all() and (rates >= 0).all() and rates.any()):
        raise InvalidRequest("rates are numbers of requests per second, 0 or more and not all 0")
    if not 1 <= num_hours <= _WEEK:
        raise InvalidRequest(f"a forecast reaches 1 to {_WEEK} hours ahead; got {num_hours}")
    season = _WEEK if len(rates) >= 3 * _WEEK else _DAY
    floor = _FLOOR * float(rates.mean())
    ahead = min(num_hours, _DAY)
    origins = range(2 * season if len(rates) > 2 * season + _DAY else season, len(rates) - ahead + 1, 3)
    actual = np.array([rates[o : o + ahead] for o in origins])
    ours = np.array([_expected(rates[:o], season, ahead) for o in origins])
    naive = np.array([rates[o - _DAY : o - _DAY + ahead] for o in origins])
    median = _expected(rates, season, num_hours)
    margin = _margin(actual, ours, floor, quantile)
    return Demand(
        median=median,
        upper=(median + floor) * margin - floor,
        quantile=quantile,
        pinball=pinball(actual, (ours + floor) * margin - floor, quantile),
        naive_pinball=pinball(actual, (naive + floor) * _margin(actual, naive, floor, quantile) - floor, quantile),
    )


def pinball(actual: Floats, predicted: Floats, quantile: float) -> float:
    """Mean loss that is least at the quantile (Koenker and Bassett 1978)."""
    short = actual - predicted
    return float(np.maximum(quantile * short, (quantile - 1) * short).mean())


def _expected(rates: Floats, season: int, num_hours: int) -> Floats:
    """[h]  the fading mean of earlier seasons at the same hour, each taken at its level, times the level of now."""
    num_seasons = len(rates) // season
    seasons = rates[-num_seasons * season :].reshape(num_seasons, season)
    weights = _FADING ** np.arange(num_seasons - 1, -1, -1.0)
    levels = seasons.mean(1)
    shape = (weights @ seasons) / max(float(weights @ levels), 1e-12)
    usual = float(weights @ levels / weights.sum())
    level = _LEVEL_TRUST * float(levels[-1]) + (1 - _LEVEL_TRUST) * usual
    return level * np.resize(shape, num_hours)


def _margin(actual: Floats, predicted: Floats, floor: float, quantile: float) -> float:
    return float(np.quantile((actual + floor) / (predicted + floor), quantile))
