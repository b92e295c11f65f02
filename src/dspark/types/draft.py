"""What is proposed, what the target is given to read, and what it is judged to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dspark.transfer import on_device, together_on_host


@dataclass
class Draft:
    """Proposed continuations of B requests.

    tokens      [B, K]     proposed ids, parents before children
    sizes       [B]        how many of the K are real
    confidence  [B, K]     P(accepted | ancestors accepted), fixed before the token is drawn; None: unknown
    parents     [B, K]     index of the predecessor, -1 for the anchor; None: a chain
    probs       [B, K, V]  law each token was drawn from (only the rejection rule asks); None: picked outright

    All but probs, which belong on the target's device, may be on any. Nonsense (other shapes, ids outside the vocabulary,
    a token that its own law excludes) costs the requests it was made for their drafts: the engine logs it and goes on.
    """

    tokens: Tensor
    sizes: Tensor
    confidence: Tensor | None = None
    parents: Tensor | None = None
    probs: Tensor | None = None

    @classmethod
    def empty(cls, num_requests: int) -> Draft:
        """Nothing proposed: plain decoding."""
        return cls(*_nothing(num_requests))

    def on_host(self) -> Draft:
        """The same with everything that the host decides on in its memory; the laws stay where they are."""
        parts, confidence = (self.tokens, self.sizes, self.confidence, self.parents), self.confidence
        if all(x is None or x.is_cpu for x in parts) and (confidence is None or confidence.dtype is torch.float):
            return Draft(*parts, self.probs)
        confidence = None if confidence is None else confidence.float()
        tokens, sizes, confidence, parents = together_on_host((self.tokens, self.sizes, confidence, self.parents))
        assert tokens is not None and sizes is not None
        return Draft(tokens, sizes, confidence, parents, self.probs)

    def among(self, rows: Sequence[int], num_requests: int) -> Draft:
        """The same proposals as `rows` of a batch of num_requests; the other requests have none."""
        if len(rows) == num_requests:
            return self

        def spread(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            out = values.new_zeros(num_requests, *values.shape[1:])
            out[on_device(list(rows), values.device, torch.long)] = values
            return out

        tokens, sizes = spread(self.tokens), spread(self.sizes)
        assert tokens is not None and sizes is not None
        return Draft(tokens, sizes, spread(self.confidence), spread(self.parents), spread(self.probs))

    @property
    def depth(self) -> Tensor:
        """[B, K]  how many draft tokens lie on the path from the anchor to each one, itself included."""
        num_requests, length = self.tokens.shape
        if self.parents is None:
            return torch.arange(1, length + 1).expand(num_requests, length)
        depth = torch.zeros(num_requests, length + 1, dtype=torch.long)
        for k in range(length):  # parents come before their children
            depth[:, k + 1] = depth.gather(1, self.parents[:, k : k + 1] + 1)[:, 0] + 1
        return depth[:, 1:]

    @property
    def real(self) -> Tensor:
        """[B, K]  which entries are tokens and which are padding."""
        real = _real(tuple(self.sizes.tolist()), self.tokens.shape[1]).clone()  # a user's scheduler may write into it
        return real if self.sizes.is_cpu else real.to(self.sizes.device)


@lru_cache(maxsize=64)
def _nothing(num_requests: int) -> tuple[Tensor, Tensor]:
    """Tokens and sizes where nothing is proposed, for reading only: plain decoding asks for them in every step."""
    return torch.zeros(num_requests, 0, dtype=torch.long), torch.zeros(num_requests, dtype=torch.long)


@lru_cache(maxsize=64)
def _real(sizes: tuple[int, ...], length: int) -> Tensor:
    """Mostly drafts are as long as those before."""
    rows = [[True] * size + [False] * (length - size) for size in sizes]
    return torch.from_numpy(np.array(rows, dtype=bool).reshape(len(sizes), length))  # sooner written than computed


@dataclass
class Verdict:
    """accepted [B, K] marks one root path per request; next_tokens [B] continues it.

    chances [B, K]: how likely each token was to be accepted before it was drawn, given that its ancestors were; not a
    number where that is not known. None: nobody asked, or the rule knows no more than what happened.
    """

    accepted: Tensor
    next_tokens: Tensor
    chances: Tensor | None = None


@dataclass(frozen=True)
class Span:
    """Tokens to append after a request's cached prefix in one forward.

    A prompt chunk, an anchor, an anchor with its draft: all the same thing. `parents` are indices within the span, -1
    for the cached prefix itself; None is a chain. `is_block` lets every token of the span see every other one (parallel
    drafters). Logits are computed for the last `num_logits` tokens only.
    """

    request_id: int
    start: int
    tokens: Sequence[int]
    parents: Sequence[int] | None = None
    num_logits: int = 0
    is_block: bool = False

    @property
    def is_chain(self) -> bool:
        """Whether each token sees those before it and no others."""
        return self.parents is None and not self.is_block
