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
