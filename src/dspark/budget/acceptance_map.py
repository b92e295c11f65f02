"""From what is stated of a draft token to P(accepted | ancestors accepted): a logistic map per position.

It looks at the confidence and at how the request has fared so far; never at the token itself or at later ones, so no
choice that is made with it anticipates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dspark.budget.calibration import LOGIT_LIMIT, Calibration
from dspark.budget.online_logistic import Array, OnlineLogistic, sigmoid
from dspark.types import Draft, Request

_LOGIT_LIMIT = 8.0
_LEAST = float(sigmoid(np.array(-LOGIT_LIMIT)))  # confidence
_UNSTATED = 2.0  # the logit that stands in for a confidence nobody gave: optimistic, or the drafter is never tried
_SHARED = 3  # coefficients for all positions: logit, the request's own record, offset
_FLATTEST = 0.2  # slope: a higher confidence never means less
_PRIOR_EVIDENCE = 4.0  # how much evidence a request needs before its own record counts half
_RECORD_FADE = 0.97  # a round
_MOST_RECORDS = 4096


@dataclass(frozen=True)
class Stated:
    """What is known of draft tokens before they are judged.

    logits  [B, K]  log-odds of the confidences, calibrated offline if that was done
    place   [B, K]  position from 0, no deeper than there are beliefs about
    own     [B, 1]  how each request has fared beside others, in log-odds
    """

    logits: Array
    place: NDArray[np.int64]
    own: Array


class AcceptanceMap:
    """The map as a logistic regression: `learner` holds its coefficients. Positions differ in their offset alone."""

    def __init__(self, calibration: Calibration | None, num_positions: int) -> None:
        self.num_positions = num_positions
        known = Calibration((1.0,)) if calibration is None else calibration
        places = np.minimum(np.arange(num_positions), len(known.temperatures) - 1)
        self._slopes = 1 / np.array(known.temperatures)[places]
        self._offsets = np.array(known.offsets or [0.0] * len(known.temperatures))[places]
        self._in_chains = lru_cache(maxsize=256)(self._at_places_in_chains)

    def learner(self, memory: float) -> OnlineLogistic:
        """Before anything is learned: the confidence as it is."""
        k = self.num_positions
        prior = np.zeros(_SHARED + k)
        prior[0] = 1.0
        spread = np.array([0.7, 0.5, 1.0, *[0.4] * k])
        low = np.array([_FLATTEST, 0.0, -5.0, *[-2.0] * k])
        high = np.array([4.0, 2.0, 5.0, *[2.0] * k])
        return OnlineLogistic(prior, spread**-2, np.stack([low, high]), memory)

    def read(self, draft: Draft, own: Array) -> Stated:
        """What the draft says of itself, and own [B, 1]."""
        shape = tuple(draft.tokens.shape)
        if draft.parents is None:
            place, slopes, offsets = self._in_chains(shape)
        else:
            place, slopes, offsets = self._at(np.minimum(draft.depth.numpy() - 1, self.num_positions - 1))
        if draft.confidence is None:
            return Stated(np.full(shape, _UNSTATED), place, own)
        # 0 and 1 have no logit; np.clip takes longer than the two
        confidence = np.minimum(np.maximum(draft.confidence.numpy().astype(np.float64), _LEAST), 1 - _LEAST)
        logits = np.log(confidence / (1 - confidence)) * slopes + offsets
        return Stated(np.minimum(np.maximum(logits, -_LOGIT_LIMIT), _LOGIT_LIMIT), place, own)

    def _at(self, place: NDArray[np.int64]) -> tuple[NDArray[np.int64], Array, Array]:
        """Places, and the slopes and offsets of the offline calibration there."""
        return place, self._slopes[place], self._offsets[place]

    def _at_places_in_chains(self, shape: tuple[int, int]) -> tuple[NDArray[np.int64], Array, Array]:
        return self._at(np.tile(np.minimum(np.arange(shape[1]), self.num_positions - 1), (shape[0], 1)))

    def apply(self, learner: OnlineLogistic, stated: Stated, rows: Sequence[int] | slice) -> Array:
        """[rows, K]  P(accepted | ancestors accepted) of these requests' tokens."""
        slope, offsets, own_share = self.terms(learner)
        return sigmoid(slope * stated.logits[rows] + offsets[stated.place[rows]] + own_share * stated.own[rows])

    def features(self, stated: Stated, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Array:
        """[N, D] such that features · coefficients are the log-odds of these tokens."""
        x = np.zeros((len(rows), _SHARED + self.num_positions))
        x[:, 0], x[:, 1], x[:, 2] = stated.logits[rows, columns], stated.own[rows, 0], 1.0
        x[np.arange(len(rows)), _SHARED + stated.place[rows, columns]] = 1.0
        return x

    def terms(self, learner: OnlineLogistic) -> tuple[float, Array, float]:
        """The slope, the offset of each position, and what a request's own record counts."""
        c = learner.coefficients
        return float(c[0]), c[2] + c[_SHARED:], float(c[1])


class OwnRecords:
    """How each request fares beside what is believed of all: a running step towards an offset of its own."""

    def __init__(self) -> None:
        self._records: dict[int, tuple[float, float]] = {}  # request -> (sum of y - p, sum of p (1 - p)), fading

    def offsets(self, requests: Sequence[Request]) -> Array:
        """[B, 1]  log-odds; 0 of a request that nothing is known of."""
        found = (self._records.get(request.id, (0.0, 0.0)) for request in requests)
        values = (miss / (evidence + _PRIOR_EVIDENCE) for miss, evidence in found)
        return np.fromiter(values, np.float64, len(requests))[:, None]

    def note(
        self, requests: Sequence[Request], own: Array, rows: NDArray[np.int64], believed: Array, happened: Array
    ) -> None:
        """Judged tokens [N], those of request rows[n]; own are the offsets that `believed` counted in."""
        misses = np.bincount(rows, happened - believed, len(requests)).tolist()
        evidence = np.bincount(rows, believed * (1 - believed), len(requests)).tolist()
        for request, offset, miss, e in zip(requests, own[:, 0].tolist(), misses, evidence, strict=True):
            if request.finish_reason is not None:
                self._records.pop(request.id, None)
            elif e:
                a, b = self._records.get(request.id, (0.0, 0.0))
                # Missed although an offset of its own was counted in: what that explained is added back.
                self._records[request.id] = (_RECORD_FADE * a + miss + e * offset, _RECORD_FADE * b + e)
        while len(self._records) > _MOST_RECORDS:
            del self._records[next(iter(self._records))]  # the oldest: a cancelled request is not seen again
