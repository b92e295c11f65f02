"""Plain decoding is a drafter that proposes nothing."""

from __future__ import annotations

from collections.abc import Sequence

from dspark.types import Draft, Request, Rule


class NoDrafter:
    """Proposes nothing: plain decoding."""

    feature_layers: tuple[int, ...] = ()
    length = 0

    def propose(self, requests: Sequence[Request], rule: Rule) -> Draft:
        return Draft.empty(len(requests))

    def release(self, request_id: int) -> None:
        pass
