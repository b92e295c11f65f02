"""Prompt lookup against the obvious quadratic search."""

from __future__ import annotations

import random

import pytest

from dspark.drafters.ngram import NGramDrafter
from dspark.errors import InvalidConfiguration
from dspark.types import Request, SamplingParams


def naive(tokens: list[int], length: int, longest: int, shortest: int) -> list[int]:
    for n in range(longest, shortest - 1, -1):
        for start in range(len(tokens) - n - 1, -1, -1):  # newest first
            if n <= len(tokens) and tokens[start : start + n] == tokens[len(tokens) - n :]:
                return tokens[start + n : start + n + length]
    return []


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_naive_search_while_the_text_grows(seed):
    rng = random.Random(seed)
    drafter = NGramDrafter(length=4, longest=3, shortest=1 + seed % 2)
    requests = [Request(i, [rng.randrange(4)], SamplingParams(), 1) for i in range(3)]
    for _ in range(60):
        draft = drafter.propose(requests, None)
        for b, request in enumerate(requests):
            guess = draft.tokens[b, : draft.sizes[b]].tolist()
            assert guess == naive(request.tokens, 4, 3, 1 + seed % 2)
            request.tokens += [rng.randrange(4) for _ in range(rng.randint(1, 3))]


def as_stated(tokens: list[int], length: int, longest: int) -> list[float]:
    """Confidences from the definition: what is in common before each token, and what the time before went on with."""
    for n in range(longest, 0, -1):
        ends = [i for i in range(n, len(tokens)) if tokens[i - n : i] == tokens[len(tokens) - n :]]
        if ends:
            break
    else:
        return []
    place, before = ends[-1], ends[-2] if len(ends) > 1 else None
    common = next((m for m in range(8) if m >= place or tokens[place - 1 - m] != tokens[-1 - m]), 8)
    stated, agrees = [], before is not None
    for k, token in enumerate(tokens[place : place + length]):
        odds = 0.5 * (common + k)
        if agrees:
            agrees = tokens[before + k] == token
            odds *= 5 if agrees else 0.2
        stated.append(odds / (1 + odds))
    return stated


@pytest.mark.parametrize("seed", range(5))
def test_confidence_goes_by_what_is_in_common_and_by_the_time_before(seed):
    rng = random.Random(seed)
    drafter = NGramDrafter(length=4)
    phrases = [[rng.randrange(6) for _ in range(rng.randint(1, 7))] for _ in range(3)]
    requests = [Request(i, [rng.randrange(6)], SamplingParams(), 1) for i in range(3)]
    seen = set()
    for _ in range(60):
        draft = drafter.propose(requests, None)
        for b, request in enumerate(requests):
            stated = as_stated(request.tokens, 4, 3)
            assert draft.confidence[b, : draft.sizes[b]].tolist() == pytest.approx(stated)
            seen.update(round(c, 4) for c in stated)
            request.tokens += rng.choice(phrases)
    assert len(seen) > 12


def test_release_forgets():
    drafter = NGramDrafter()
    drafter.propose([Request(7, [1, 2, 1], SamplingParams(), 3)], None)
    drafter.release(7)
    assert drafter.propose([Request(7, [5, 2], SamplingParams(), 2)], None).sizes.tolist() == [0]
    drafter.release(99)


@pytest.mark.parametrize("options", [{"length": 0}, {"longest": 1, "shortest": 2}, {"shortest": 0}])
def test_bad_options(options):
    with pytest.raises(InvalidConfiguration):
        NGramDrafter(**options)
