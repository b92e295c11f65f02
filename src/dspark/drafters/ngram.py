"""Prompt lookup: repeat what followed the last time these tokens were seen (Saxena 2023; PLD)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from dspark.errors import InvalidConfiguration
from dspark.types import Draft, Request, Rule


class NGramDrafter:
    """Looks for the newest earlier occurrence of the last `longest` .. `shortest` tokens, longest first.

    An index from n-gram to the place after its newest occurrence grows with the text, so a proposal costs a few look-ups
    however long the text is. A match near the end gives a shorter draft; nothing beyond the end is made up.

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

    def propose(self, requests: Sequence[Request], rule: Rule) -> Draft:
        guesses = [self._lookup(r) for r in requests]
        longest = max(map(len, guesses), default=0)
        padded = [guess + [0] * (longest - len(guess)) for guess in guesses]
        tokens = torch.tensor(padded, dtype=torch.long).view(len(requests), longest)
        return Draft(tokens, torch.tensor([len(g) for g in guesses], dtype=torch.long))

    def release(self, request_id: int) -> None:
        self._indices.pop(request_id, None)

    def _lookup(self, request: Request) -> list[int]:
        tokens, index = request.tokens, self._indices.setdefault(request.id, _Index())
        # Only what ends before the anchor is indexed: the last n-gram must not find itself.
        for end in range(index.num_read, len(tokens) - 1):
            for n in self.sizes:
                if n <= end + 1:
                    index.place_after[tuple(tokens[end + 1 - n : end + 1])] = end + 1
        index.num_read = max(index.num_read, len(tokens) - 1)
        for n in self.sizes:
            if place := index.place_after.get(tuple(tokens[-n:])):
                return tokens[place : place + self.length]
        return []


@dataclass
class _Index:
    place_after: dict[tuple[int, ...], int] = field(default_factory=dict)
    num_read: int = 0
