"""From what is stated of a draft token to P(accepted | ancestors accepted): a logistic map per position.

It looks at the confidence and at how the request has fared so far; never at the token itself or at later ones, so no
choice that is made with it anticipates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dspark.budget.calibration import LOGIT_LIMIT, Calibration
from dspark.budget.judged import FEW
from dspark.budget.online_logistic import Array, OnlineLogistic, sigmoid
from dspark.types import Draft, Request

_LOGIT_LIMIT = 8.0
_UNSTATED = 2.0  # the logit that stands in for a confidence nobody gave: optimistic, or the drafter is never tried
_SHARED = 3  # coefficients for all positions: logit, the request's own record, offset
_FLATTEST = 0.2  # slope: a higher confidence never means less
_PRIOR_EVIDENCE = 4.0  # how much evidence a request needs before its own record counts half
_RECORD_FADE = 0.97  # a round
_MOST_RECORDS = 4096


class Stated(NamedTuple):
    """What is known of draft tokens before they are judged.

    confidence [B, K]  as the drafter gave it
    place [B, K]       position from 0, no deeper than there are beliefs about
    at                 the same for all that is kept by position: its first K, or as `place` has them
    own                B log-odds: how each request has fared beside others
    """

    confidence: Array
    place: NDArray[np.int64]
    at: slice | NDArray[np.int64]
    own: list[float]


class Law(NamedTuple):
    """A learner's map, made ready: the log-odds of a token are slope · logit(c) + offset + own_share · own.

    slope, offset [positions], and the same as lists; coefficients are those that it was made of
    """

    coefficients: Array
    slope: Array
    offset: Array
    own_share: float
    slopes: list[float]
    offsets: list[float]


class AcceptanceMap:
    """The map as a logistic regression: `learner` holds its coefficients. Positions differ in their offset alone."""

    def __init__(self, calibration: Calibration | None, num_positions: int) -> None:
        self.num_positions = num_positions
        known = Calibration((1.0,)) if calibration is None else calibration
        places = np.minimum(np.arange(num_positions), len(known.temperatures) - 1)
        self._slopes = 1 / np.array(known.temperatures)[places]
        offsets = np.array(known.offsets or [0.0] * len(known.temperatures))[places]
        farthest = _LOGIT_LIMIT + LOGIT_LIMIT * self._slopes
        self._offsets = np.clip(offsets, -farthest, farthest)
        # 0 and 1 have no logit, and calibrated logits are bounded as well: both are bounds of the confidence.
        self._least, self._most, self._unstated = (
            self._confidence(z) for z in (-_LOGIT_LIMIT, _LOGIT_LIMIT, _UNSTATED)
        )
        self._bounds = list(zip(self._least.tolist(), self._most.tolist(), strict=True))
        self._in_chains = lru_cache(maxsize=256)(self._places_in_chains)

    def _confidence(self, calibrated: float) -> Array:
        """[positions]  confidences whose calibrated logit is the nearest to this."""
        return sigmoid(np.clip((calibrated - self._offsets) / self._slopes, -LOGIT_LIMIT, LOGIT_LIMIT))

    def learner(self, memory: float) -> OnlineLogistic:
        """Before anything is learned: the confidence as it is."""
        k = self.num_positions
        prior = np.zeros(_SHARED + k)
        prior[0] = 1.0
        spread = np.array([0.7, 0.5, 1.0, *[0.4] * k])
        low = np.array([_FLATTEST, 0.0, -5.0, *[-2.0] * k])
        high = np.array([4.0, 2.0, 5.0, *[2.0] * k])
        return OnlineLogistic(prior, spread**-2, np.stack([low, high]), memory)

    def read(self, draft: Draft, own: list[float]) -> Stated:
        """What the draft says of itself, and own (B)."""
        at: slice | NDArray[np.int64]
        if draft.parents is None:
            place, at = self._in_chains(*draft.tokens.shape)
        else:
            place = at = np.minimum(draft.depth.numpy() - 1, self.num_positions - 1)
        confidence = None if draft.confidence is None else draft.confidence.numpy().astype(np.float64)
        return Stated(self._unstated[place] if confidence is None else confidence, place, at, own)

    def _places_in_chains(self, num_requests: int, length: int) -> tuple[NDArray[np.int64], slice | NDArray[np.int64]]:
        row = np.minimum(np.arange(length), self.num_positions - 1)
        return np.tile(row, (num_requests, 1)), slice(length) if length <= self.num_positions else row

    def law(self, learner: OnlineLogistic) -> Law:
        """What the learner has learned, ready for `apply`."""
        slope, offsets, own_share = self.terms(learner)
        slopes, offsets = slope * self._slopes, slope * self._offsets + offsets
        return Law(learner.coefficients, slopes, offsets, own_share, slopes.tolist(), offsets.tolist())

    def apply(self, laws: Sequence[Law], stated: Stated) -> Array:
        """[B, K]  P(accepted | ancestors accepted), each request by its law (B), or all by one."""
        if stated.confidence.size <= FEW:
            return self._token_by_token(laws, stated)
        confidence, own = self._within_bounds(stated.confidence, stated.at), np.array(stated.own)[:, None]
        if len(laws) == 1:
            slope, offset, by_record = laws[0].slope[stated.at], laws[0].offset[stated.at], laws[0].own_share * own
        else:
            rows = list(zip(laws, stated.place, strict=True))
            slope, offset = np.stack([law.slope[p] for law, p in rows]), np.stack([law.offset[p] for law, p in rows])
            by_record = np.array([law.own_share for law in laws])[:, None] * own
        return sigmoid(np.log(confidence / (1 - confidence)) * slope + (offset + by_record))

    def _token_by_token(self, laws: Sequence[Law], stated: Stated) -> Array:
        """The same as `apply`, without arrays."""
        rows = []
        for b, (confidence, place) in enumerate(zip(stated.confidence.tolist(), stated.place.tolist(), strict=True)):
            law, believed = laws[b % len(laws)], []
            by_record = law.own_share * stated.own[b]
            for c, p in zip(confidence, place, strict=True):
                least, most = self._bounds[p]
                c = least if c < least else most if c > most else c
                log_odds = math.log(c / (1 - c)) * law.slopes[p] + (law.offsets[p] + by_record)
                believed.append(1 / (1 + math.exp(-log_odds)))
            rows.append(believed)
        return np.array(rows).reshape(stated.confidence.shape)

    def _within_bounds(self, confidence: Array, at: slice | NDArray[np.int64]) -> Array:
        return np.minimum(np.maximum(confidence, self._least[at]), self._most[at])

    def features(self, confidence: Array, place: NDArray[np.int64], own: Array) -> Array:
        """[N, D] such that features · coefficients are the log-odds of tokens: confidence and place as stated, own [N]."""
        x = np.zeros((len(place), _SHARED + self.num_positions))
        confidence = self._within_bounds(confidence, place)
        x[:, 0] = np.log(confidence / (1 - confidence)) * self._slopes[place] + self._offsets[place]
        x[:, 1], x[:, 2] = own, 1.0
        x[np.arange(len(place)), _SHARED + place] = 1.0
        return x

    def terms(self, learner: OnlineLogistic) -> tuple[float, Array, float]:
        """The slope, the offset of each position, and what a request's own record counts."""
        c = learner.coefficients
        return float(c[0]), c[2] + c[_SHARED:], float(c[1])


class OwnRecords:
    """How each request fares beside what is believed of all: a running step towards an offset of its own."""

    def __init__(self) -> None:
        self._records: dict[int, tuple[float, float]] = {}  # request -> (sum of y - p, sum of p (1 - p)), fading

    def offsets(self, requests: Sequence[Request]) -> list[float]:
        """B log-odds; 0 of a request that nothing is known of."""
        found = (self._records.get(request.id, (0.0, 0.0)) for request in requests)
        return [miss / (evidence + _PRIOR_EVIDENCE) for miss, evidence in found]

    def note(self, request: Request, own: float, miss: float, evidence: float) -> None:
        """Of a request's judged tokens: sums of y - p and of p (1 - p), where p counted the offset `own` in."""
        if request.finish_reason is not None:
            self._records.pop(request.id, None)
        elif evidence:
            a, b = self._records.get(request.id, (0.0, 0.0))
            # Missed although an offset of its own was counted in: what that explained is added back.
            self._records[request.id] = _RECORD_FADE * a + miss + evidence * own, _RECORD_FADE * b + evidence
            if len(self._records) > _MOST_RECORDS:
                del self._records[next(iter(self._records))]  # the oldest: a cancelled request is not seen again
