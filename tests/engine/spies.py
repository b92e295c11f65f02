"""What only happens by chance, made to happen; and spies that say what else should have come of it.

A spy before a drafter: is it given what a forward over the whole text gives, does it draft as one that reads that at once?
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dspark.budget.guard import Guard
from dspark.engine.engine import Engine
from dspark.target.target import Target
from dspark.types import Draft, Drafter, Request, Rule
from engine.models import Known, reference_features, reference_logits


class Listening:
    """A rule that writes down the logits of every drafting position, by request and draft path, and goes for the largest."""

    allows_anticipation, reports_chances = True, False

    def __init__(self) -> None:
        self.heard: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def draft(
        self, logits: Tensor, requests: Sequence[Request], previous: Sequence[Sequence[int]]
    ) -> tuple[Tensor, None]:
        return self.outlook(logits, requests, previous).argmax(-1), None

    def outlook(self, logits: Tensor, requests: Sequence[Request], previous: Sequence[Sequence[int]]) -> Tensor:
        for row, request, path in zip(logits, requests, previous, strict=True):
            self.heard[request.id, tuple(path)] = row.clone()
        return torch.log_softmax(logits, -1)

    def noise_ahead(self, requests: Sequence[Request], length: int) -> None:
        return None

    def verify(self, *_: Any) -> Any:
        raise AssertionError("nobody verifies here")


class Whole:
    """Features of texts by one forward over each; a prefix has the same, because nothing looks ahead."""

    def __init__(self, target: Target, texts: Sequence[Sequence[int]], layers: Sequence[int]) -> None:
        self.texts = [list(text) for text in texts]
        self.features = [reference_features(target, text, layers) for text in self.texts] if layers else []
        self.logits = [reference_logits(target, text) for text in self.texts]

    def of(self, tokens: list[int]) -> Tensor:
        """[n, F]  of all tokens but the last."""
        n = len(tokens)
        return next(f[: n - 1] for text, f in zip(self.texts, self.features, strict=True) if text[:n] == tokens)


class Spy:
    """Hands on to `drafter` what it is given and checks it; what is verified is what `guesses` says, which is often right.

    afresh  makes a drafter that has read nothing
    check   of what a drafter without features said: logits by request and path
    """

    def __init__(
        self,
        drafter: Drafter,
        guesses: Drafter,
        whole: Whole,
        afresh: Callable[[], Drafter] | None = None,
        check: Callable[[Request, tuple[int, ...], Tensor], None] | None = None,
    ) -> None:
        self.drafter, self.guesses, self.whole, self.afresh, self.check = drafter, guesses, whole, afresh, check
        self.feature_layers, self.length = drafter.feature_layers, max(drafter.length, guesses.length)
        self.num_given: dict[int, int] = {}  # positions of each request, since it was last released
        self.num_checked = self.num_compared = self.num_missed = self.num_read = 0
        if hasattr(drafter, "read"):
            self.read = self._read

    def propose(self, requests: Sequence[Request], rule: Rule) -> Draft:
        self._look_at(requests)
        live = Listening()
        self.drafter.propose(requests, live)
        if self.afresh is not None:
            anew = Listening()
            self.afresh().propose([self._read_at_once(r) for r in requests], anew)
            self._compare(live, anew)
        if self.check is not None:
            by_id = {r.id: r for r in requests}
            for (request_id, path), logits in live.heard.items():
                self.check(by_id[request_id], path, logits)
                self.num_compared += 1
        return self.guesses.propose(requests, rule)

    def release(self, request_id: int) -> None:
        self.num_given.pop(request_id, None)
        self.drafter.release(request_id)

    def _read(self, requests: Sequence[Request]) -> None:
        self._look_at(requests)
        self.num_read += len(requests)
        self.drafter.read(requests)  # type: ignore[attr-defined]  # asked in __init__

    def _look_at(self, requests: Sequence[Request]) -> None:
        for r in requests:
            assert r.num_cached == len(r.tokens) - 1 and not r.feature_pieces
            if not self.feature_layers:
                assert r.features is None
                continue
            start = self.num_given.get(r.id, 0)
            have = 0 if r.features is None else len(r.features)
            assert (r.features_start, have) == (start, r.num_cached - start), f"{start} positions were given before"
            if r.features is not None:
                expected = self.whole.of(r.tokens)[start:]
                torch.testing.assert_close(r.features, expected, atol=3e-4, rtol=1e-3)
            self.num_given[r.id] = r.num_cached
            self.num_checked += have

    def _read_at_once(self, request: Request) -> Request:
        features = self.whole.of(request.tokens) if self.feature_layers and request.num_cached else None
        same = (request.id, list(request.tokens), request.params, request.num_prompt_tokens)
        return Request(*same, num_cached=request.num_cached, features=features)

    def _compare(self, live: Listening, anew: Listening) -> None:
        """Near ties may send the two down different paths; where they went together they must agree."""
        assert {i for i, path in live.heard if not path} == {i for i, path in anew.heard if not path}
        for place, logits in live.heard.items():
            if place in anew.heard:
                torch.testing.assert_close(logits, anew.heard[place], atol=2e-3, rtol=2e-3)
                self.num_compared += 1
            else:
                self.num_missed += 1


class Fickle(Guard):
    """Drafts now for these and now for those."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(Known())
        self.rng = rng

    def choose(self, request_ids, load, kinds=(), num_generated=(), num_prompt=()):
        self.reason = "a whim"
        share = self.rng.choice([0, 0.5, 1, 1])
        return [b for b in range(len(request_ids)) if self.rng.random() < share]

    def observe(self, record):
        pass


class Interrupted(Exception):
    pass


def interrupt(engine: Engine, rng: random.Random) -> None:
    """A step that ends in the middle of its work."""
    places = [
        (engine.target, "extend"),
        (engine.target, "keep"),
        (engine.rule, "verify"),
        (engine.drafting, "keep_features"),
        (engine.ledger, "_append"),
    ]
    what, name = rng.choice(places + [(engine.prefixes, "note")] * (engine.prefixes is not None))
    work, calls = getattr(what, name), rng.randrange(2)

    def until_then(*args, **kwargs):
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise Interrupted
        return work(*args, **kwargs)

    with mock.patch.object(what, name, until_then), contextlib.suppress(Interrupted):
        engine.step()
