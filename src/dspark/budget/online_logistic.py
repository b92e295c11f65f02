"""A logistic regression that never stops: fitted to a stream whose law may change.

Each update is one Newton step on past labels that fade, new labels as they are, and a prior that stays. Past labels are
remembered as the quadratic around the last fit, so memory and time do not grow with the stream.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_ALARM = 4.5  # standard deviations by which recent outcomes may miss what was believed before it counts as drift
_RECENT = 200.0  # rounds that the drift statistic looks back on
_USUAL = 20 * _RECENT  # rounds over which its usual size is learned: outcomes of one request resemble each other
_KEPT_AT_ALARM = 0.02  # share of what was learned that an alarm leaves
_STEP_LIMIT = 1.5  # of one coefficient in one update


@dataclass
class OnlineLogistic:
    """P(happened) = sigmoid(coefficients · x) for x [N, D].

    prior, prior_precision [D]  where coefficients start, and how firmly they are held there
    bounds [2, D]               between which they stay
    memory                      rounds after which a label weighs 1/e
    num_watched                 the first coefficients are watched for drift
    """

    prior: Array
    prior_precision: Array
    bounds: Array
    memory: float
    num_watched: int = 3
    coefficients: Array = field(init=False)
    information: Array = field(init=False)  # [D, D] of past labels
    num_rounds: float = 0.0
    num_alarms: int = 0
    drift_at_alarm: float = 0.0
    surprise: Array = field(init=False)  # [num_watched] recent sums of x (y - p), and their variances if beliefs hold
    surprise_variance: Array = field(init=False)
    usual_square: float = 1.0  # of the drift statistic, 1 where outcomes are independent

    def __post_init__(self) -> None:
        self.coefficients = self.prior.copy()
        self.information = np.zeros((len(self.prior), len(self.prior)))
        self.surprise, self.surprise_variance = np.zeros(self.num_watched), np.zeros(self.num_watched)

    def learn(self, x: Array, happened: Array, weights: Array, num_rounds: int) -> bool:
        """Take in labels [N] of `num_rounds` rounds; whether they show that the law has changed."""
        predicted = sigmoid(x @ self.coefficients)
        has_drifted = self._watch(x, happened, predicted, num_rounds)
        if has_drifted:
            self.information *= _KEPT_AT_ALARM
            self.num_alarms += 1
        kept = np.exp(-num_rounds / self.memory)
        self.information *= kept
        self.num_rounds += num_rounds
        # Fading past labels leaves the prior a pull that they had balanced.
        pull = (1.0 - (kept * _KEPT_AT_ALARM if has_drifted else kept)) * self.prior_precision
        gradient = x.T @ (weights * (happened - predicted)) - pull * (self.coefficients - self.prior)
        self.information += x.T @ (x * (weights * predicted * (1.0 - predicted))[:, None])
        step = np.linalg.solve(self.information + np.diag(self.prior_precision), gradient)
        moved = self.coefficients + np.clip(step, -_STEP_LIMIT, _STEP_LIMIT)
        self.coefficients = np.clip(moved, self.bounds[0], self.bounds[1])
        return has_drifted

    @property
    def drift(self) -> float:
        """By how many standard deviations recent outcomes miss what was believed of them."""
        return float(np.sqrt(np.max(self._squares) / max(1.0, self.usual_square)))

    @property
    def _squares(self) -> Array:
        return self.surprise**2 / np.maximum(self.surprise_variance, 1.0)

    def _watch(self, x: Array, happened: Array, predicted: Array, num_rounds: int) -> bool:
        kept, watched = np.exp(-num_rounds / _RECENT), x[:, : self.num_watched]
        self.surprise = kept * self.surprise + watched.T @ (happened - predicted)
        self.surprise_variance = kept**2 * self.surprise_variance + (watched**2).T @ (predicted * (1.0 - predicted))
        self.usual_square += (1.0 - np.exp(-num_rounds / _USUAL)) * (float(self._squares.mean()) - self.usual_square)
        if self.drift <= _ALARM:
            return False
        self.drift_at_alarm = self.drift
        self.surprise[:], self.surprise_variance[:] = 0.0, 0.0
        return True

    def to_json(self) -> dict[str, Any]:
        """What has been learned, as `restore` takes it."""
        return {
            "coefficients": self.coefficients.tolist(),
            "information": self.information.tolist(),
            "prior": self.prior.tolist(),
            "num_rounds": self.num_rounds,
            "num_alarms": self.num_alarms,
            "usual_square": self.usual_square,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from to_json; ValueError if it is not of this shape or not finite."""
        for name in ("coefficients", "information", "prior"):
            value = np.asarray(state[name], dtype=np.float64)
            if value.shape != getattr(self, name).shape or not np.isfinite(value).all():
                raise ValueError(
                    f"{name} of shape {list(value.shape)}, expected {list(getattr(self, name).shape)}, finite"
                )
            setattr(self, name, value)
        self.num_rounds, self.num_alarms = float(state["num_rounds"]), int(state["num_alarms"])
        self.usual_square = float(state["usual_square"])


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-z)), for arrays."""
    return 1.0 / (1.0 + np.exp(-x))
