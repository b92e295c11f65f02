"""Prompt lookup: repeat what followed the last time these tokens were seen (Saxena 2023; PLD)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from dspark.errors import InvalidConfiguration
from dspark.types import Draft, Request, Rule

_MOST_MATCHED = 8  # tokens in common before the draft that are counted
_ODDS = 0.5  # for each token in common
_AGREEMENT = (
    5.0  # times better where the time before went on with the same token, as many times worse where with another
)
_ALONE = -1  # in the place of the number of tokens agreed upon: there was no time before


class NGramDrafter:
    """Looks for the newest earlier occurrence of the last `longest` .. `shortest` tokens, longest first.

    An index from n-gram to the place after its newest occurrence grows with the text, so a proposal costs a few look-ups
    however long the text is. A match near the end gives a shorter draft; nothing beyond the end is made up.

    The confidence of a token grows with what the two places have in common before it, draft tokens included, and goes by
    whether the occurrence before the newest went on with the same token: on the embedded target that tells most of what
    can be known of a match. Where a model copies more or less than this says, beliefs learn it while serving.

    length             draft tokens per step, at most
    longest, shortest  tokens that must have been seen together
    """

    feature_layers: tuple[int, ...] = ()

    def __init__(self, length: int = 7, longest: int = 3, shortest: int = 1) -> None:
        if not 1 <= shortest <= longest or length < 1:
            raise InvalidConfiguration(
                f"ngram needs 1 <= shortest <= longest and length >= 1; got shortest={shortest}, longest={longest}, length={length}"
            )
        self.length, self.sizes = length, range(longest, shortest - 1, -1)
        self._indices: dict[int, _Index] = {}
        self._confidences = _confidences(length)

    def propose(self, requests: Sequence[Request], rule: Rule) -> Draft:
        found = [self._lookup(r) for r in requests]
        longest = max(len(guess) for guess, _, _ in found)
        tokens = np.array([guess + [0] * (longest - len(guess)) for guess, _, _ in found], dtype=np.int64)
        sizes = np.array([len(guess) for guess, _, _ in found], dtype=np.int64)
        stated = self._confidences[[matched for _, matched, _ in found], [agreed for _, _, agreed in found], :longest]
        return Draft(*(torch.from_numpy(x) for x in (tokens.reshape(len(requests), longest), sizes, stated)))

    def release(self, request_id: int) -> None:
        self._indices.pop(request_id, None)

    def _lookup(self, request: Request) -> tuple[list[int], int, int]:
        """A guess, how many tokens before it are in common, and how many of its own with the time before."""
        tokens, index = request.tokens, self._indices.setdefault(request.id, _Index())
        places = index.places_after
        # Only what ends before the anchor is indexed: the last n-gram must not find itself.
        for end in range(index.num_read, len(tokens) - 1):
            for n in self.sizes:
                if n <= end + 1:
                    gram = tuple(tokens[end + 1 - n : end + 1])
                    places[gram] = end + 1, places.get(gram, _NOWHERE)[0]
        index.num_read = max(index.num_read, len(tokens) - 1)
        for n in self.sizes:
            newest, before = places.get(tuple(tokens[-n:]), _NOWHERE)
            if newest:
                guess = tokens[newest : newest + self.length]
                agreed = _num_common(guess, tokens[before : before + self.length]) if before else _ALONE
                return guess, _num_matched(tokens, newest, n), agreed
        return [], 0, _ALONE


_NOWHERE = 0, 0  # nothing comes before the first token


@dataclass
class _Index:
    places_after: dict[tuple[int, ...], tuple[int, int]] = field(default_factory=dict)  # the newest, and the one before
    num_read: int = 0


def _num_matched(tokens: list[int], place: int, known: int) -> int:
    """How many tokens before `place` are also the last ones; `known` are."""
    most = min(_MOST_MATCHED, place)
    if tokens[place - most : place] == tokens[-most:]:
        return most
    while tokens[place - 1 - known] == tokens[-1 - known]:
        known += 1
    return known


def _num_common(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    if a == b[: len(a)]:
        return len(a)
    return next(n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)


def _confidences(length: int) -> NDArray[np.float32]:
    """[tokens in common, tokens agreed upon, K]"""
    common = np.arange(_MOST_MATCHED + 1)[:, None, None] + np.arange(length)
    agreed, k = np.arange(length + 2)[:, None], np.arange(length)
    times = np.where(k < agreed, _AGREEMENT, np.where(k == agreed, 1 / _AGREEMENT, 1.0))
    times[_ALONE] = 1.0
    odds = _ODDS * common * times
    return (odds / (1 + odds)).astype(np.float32)
