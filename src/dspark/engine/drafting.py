"""Asking the drafter: for the requests it pays for, in a way that its faults cost speed and never answers."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from dspark.budget.guard import Guard
from dspark.target.target import Target
from dspark.transfer import together_on_device
from dspark.types import Draft, Drafter, FeaturePiece, Request, Rule, StepRecord

log = logging.getLogger(__name__)

# Positions of one request whose features are kept while the drafter is not asked about it. They take about as much
# memory as the drafter's own keys and values would, and reading them for nothing takes time from everybody.
_MOST_UNREAD = 4096
_FEW_HELD = 2048  # positions of steps that are held on to, whoever needs them
_MOST_HELD = 4  # times as many as are needed: steps go with the last request that ran in them, so it is seldom more


class Drafting:
    """One drafter at work in an engine.

    Features of committed positions pile up while a request is not drafted for. At a bound the drafter reads them without
    drafting, if it can; else it is asked and its draft dropped.
    """

    def __init__(self, drafter: Drafter, target: Target, rule: Rule, guard: Guard | None) -> None:
        self.drafter, self.target, self.rule, self.guard = drafter, target, rule, guard
        self._reads_pieces = getattr(drafter, "reads_pieces", False)
        self._failed: set[int] = set()  # requests that go on without drafts
        self._has_logged = False
        self._could: Sequence[Request] = ()  # that the guard was asked about last,
        self._ids: list[int] = []  # their ids
        self._kinds: list[tuple[str | None, bool]] = []  # of what kind they were,
        self._num_prompt: list[int] = []  # and how long their prompts
        self._num_spared = 0  # positions that each of them may yet get before one has too many unread
        # Features of steps, and the requests that have their first rows, one each, which nobody has asked for yet.
        self._steps: list[tuple[Tensor, list[Request]]] = []
        self._num_kept = 0  # positions of steps since it was last looked how many are held,
        self._look_after = _FEW_HELD  # and how many it takes to look again

    def propose(self, record: StepRecord, decoding: Sequence[Request], with_room: Sequence[int]) -> Draft:
        """A draft for the requests at `with_room` for which the guard finds it worth its time; record says for whom."""
        if not self.drafter.length:
            return Draft.empty(len(decoding))
        rows = [b for b in with_room if decoding[b].id not in self._failed] if self._failed else with_room
        if self.guard is not None and rows:
            rows = self._worth_asking(self.guard, record, decoding, rows)
        if not rows:
            return Draft.empty(len(decoding))
        asked = [decoding[b] for b in rows]
        record.num_unread = sum(map(self._offer_features, asked))
        record.num_asked = len(asked)
        draft = self._ask(record, asked)
        self._drop_features(asked)
        if len(rows) == len(with_room):  # who has no room for a draft ends in this step
            self._steps.clear()
        return draft.among(rows, len(decoding))

    def _worth_asking(
        self, guard: Guard, record: StepRecord, decoding: Sequence[Request], rows: Sequence[int]
    ) -> list[int]:
        assert record.load is not None
        could = decoding if len(rows) == len(decoding) else [decoding[b] for b in rows]
        if could != self._could:  # mostly they are the same
            self._could, self._ids, self._kinds = could, [r.id for r in could], [r.kind for r in could]
            self._num_prompt = [r.num_prompt_tokens for r in could]
            self._num_spared = 0
        num_generated = [len(r.tokens) - n for r, n in zip(could, self._num_prompt, strict=True)]
        chosen = guard.choose(self._ids, record.load, self._kinds, num_generated, self._num_prompt)
        if len(chosen) < len(rows):
            record.num_skipped, record.skip_reason = len(rows) - len(chosen), guard.reason
            self._num_spared -= 1
            if chosen:
                asked = {*chosen}
                self._bound_features(record, [r for n, r in enumerate(could) if n not in asked])
                self._num_spared = 0
            elif self._num_spared < 0:
                self._num_spared = self._bound_features(record, could)
        return [rows[c] for c in chosen]

    def propose_unread(self, record: StepRecord, requests: Sequence[Request]) -> Draft:
        """A draft for all of them, wherever it lies, which nobody has looked at: of drafters that leave chains."""
        record.num_unread = sum(map(self._offer_features, requests))
        record.num_asked = len(requests)
        try:
            draft = self.drafter.propose(requests, self.rule)
            assert draft.tokens.shape == (len(requests), self.drafter.length) and draft.parents is None
        except AssertionError:
            raise
        except Exception as error:  # noqa: BLE001  # as in _ask
            self._give_up(record, requests, error)
            draft = Draft.empty(len(requests))
        self._drop_features(requests)
        return draft

    def has_given_up(self, requests: Sequence[Request]) -> bool:
        """Whether any of them goes on without drafts, because the drafter failed on it."""
        return any(r.id in self._failed for r in requests)

    def keep_features(self, request: Request, piece: FeaturePiece) -> None:
        """Remember features of the positions just committed until the drafter has read them."""
        if not self._failed or request.id not in self._failed:
            if self._steps:
                self._hand_out(request, request.num_cached - piece.num)
            request.feature_pieces.append(piece)

    def end_step(self, features: Tensor, requests: Sequence[Request], num_alone: int) -> None:
        """Remember the features [T, F] of a step for the first `num_alone` of its requests, which have read one token each:
        where drafts do not pay, that is less work than a piece for each of them. Let go of steps of which little is needed.
        """
        if num_alone:
            self._steps.append((features, [*requests[:num_alone]]))
        self._num_kept += features.shape[0]  # `len` asks several things first
        if self._num_kept < self._look_after:
            return
        held = [step for step, _ in self._steps]
        held += (piece.features for request in requests for piece in request.feature_pieces)
        num_held = sum({id(step): step.shape[0] for step in held}.values())
        num_needed = sum(r.num_cached - r.features_start for r in requests if r.id not in self._failed)
        self._num_kept, self._look_after = 0, max(_FEW_HELD, num_needed)
        if num_held > max(_FEW_HELD, _MOST_HELD * num_needed):
            for request in requests:
                self._hand_out(request, request.num_cached)
                if request.feature_pieces:
                    joined = torch.cat([piece.cut for piece in request.feature_pieces])
                    request.feature_pieces[:] = [FeaturePiece(joined, 0, len(joined))]
            self._steps.clear()

    def forget(self, request: Request) -> None:
        """The request has ended, or must be read again from the start."""
        self._release(request)
        self._failed.discard(request.id)
        request.features, request.features_start = None, 0
        request.feature_pieces.clear()

    def _ask(self, record: StepRecord, asked: Sequence[Request]) -> Draft:
        try:
            draft = self.drafter.propose(asked, self.rule)
            draft = draft.on_host() if isinstance(draft, Draft) else draft
            fault: Exception | str | None = _nonsense(draft, len(asked), self.target.vocab_size, self.drafter.length)
        except AssertionError:
            raise  # a broken invariant is a bug to be seen
        except Exception as error:  # noqa: BLE001  # whatever a drafter, a user's own file included, may raise
            fault = error
        if fault is None:
            if draft.parents is not None:  # what lies in padding may point anywhere, and followers index with it
                draft.parents = draft.parents.long().masked_fill(~draft.real, -1)
            return draft if draft.tokens.numel() else Draft.empty(len(asked))
        self._give_up(record, asked, fault)
        return Draft.empty(len(asked))

    def _give_up(self, record: StepRecord, asked: Sequence[Request], fault: Exception | str) -> None:
        record.num_faults += len(asked)
        self._log_once(fault)
        for request in asked:
            self._release(request)
            self._failed.add(request.id)
            # A drafter that writes into the target's cache may have been cut short before it tidied up.
            if self.target.cache.length(request.id) > request.num_cached:
                self.target.keep(request.id, request.num_cached, ())

    def _release(self, request: Request) -> None:
        try:
            self.drafter.release(request.id)
        except Exception as error:  # noqa: BLE001  # a request that ends well is not undone by its drafter
            self._log_once(error)

    def _log_once(self, fault: Exception | str) -> None:
        if not self._has_logged:
            raised = fault if isinstance(fault, Exception) else None
            log.error("the drafter failed (%s); its requests go on without drafts", fault, exc_info=raised)
            self._has_logged = True

    def _bound_features(self, record: StepRecord, left_out: Sequence[Request]) -> int:
        """Have the drafter read what has piled up for requests that it is not asked about; how many positions more none of
        them has too many with.
        """
        most = max(r.num_cached - r.features_start for r in left_out)
        if most <= _MOST_UNREAD:
            return _MOST_UNREAD - most
        full = [
            r for r in left_out if r.num_cached > r.features_start + _MOST_UNREAD and (self._steps or r.feature_pieces)
        ]
        if not full:
            return 0
        record.num_unread += sum(map(self._offer_features, full))
        read = getattr(self.drafter, "read", None)
        if not callable(read):
            self._ask(record, full)
        else:
            try:
                read(full)
            except AssertionError:
                raise
            except Exception as error:  # noqa: BLE001  # as in _ask
                self._give_up(record, full, error)
        self._drop_features(full)
        return 0

    def _hand_out(self, request: Request, stop: int) -> None:
        """Give a request its own features of positions before `stop`, as far as they lie in steps that were remembered."""
        if request.id in self._failed:
            return
        start = request.features_start + sum(map(len, request.feature_pieces))
        start += 0 if request.features is None else request.features.shape[0]
        own: list[FeaturePiece] = []
        place = 0
        for features, requests in reversed(self._steps):
            if len(own) == stop - start:
                break
            if place >= len(requests) or requests[place] is not request:  # mostly it is where it was
                if request not in requests:
                    continue
                place = requests.index(request)
            own.append(FeaturePiece(features, place, 1))
        assert len(own) == stop - start, (
            f"request {request.id}: features of {stop - start - len(own)} positions are lost"
        )
        request.feature_pieces += reversed(own)

    def _offer_features(self, request: Request) -> int:
        """Have features as the drafter reads them; of how many positions."""
        if self._steps:
            self._hand_out(request, request.num_cached)
        if self._reads_pieces:
            joined = 0 if request.features is None else request.features.shape[0]
            return joined + sum(piece.num for piece in request.feature_pieces)
        return _join_features(request)

    def _drop_features(self, requests: Sequence[Request]) -> None:
        """The drafter has read them."""
        for request in requests:
            request.features_start, request.features = request.num_cached, None
            request.feature_pieces.clear()


def _join_features(request: Request) -> int:
    """Make one tensor of the pieces; how many positions it has."""
    pieces = request.feature_pieces
    if len(pieces) == 1 and request.features is None:  # mostly
        request.features = pieces[0].cut
        return pieces.pop().num
    if pieces:
        cut = [piece.cut for piece in pieces]
        request.features = torch.cat(cut if request.features is None else [request.features, *cut])
        pieces.clear()
    return 0 if request.features is None else len(request.features)


def _nonsense(draft: object, num_requests: int, vocab_size: int, length: int) -> str | None:
    """What makes a draft unusable, in words; None: nothing."""
    if not isinstance(draft, Draft):
        return f"propose gave {type(draft).__name__}; expected a Draft"
    tokens, sizes, shape = draft.tokens, draft.sizes, draft.tokens.shape
    if len(shape) != 2 or shape[0] != num_requests or sizes.shape != (num_requests,):
        return f"tokens {list(shape)} and sizes {list(sizes.shape)} for {num_requests} requests"
    width = shape[1]
    if width > length:  # slots were counted with it
        return f"drafts of {width} tokens by a drafter whose `length` is {length}"
    for name, values in (("confidence", draft.confidence), ("parents", draft.parents)):
        if values is not None and values.shape != shape:
            return f"{name} {list(values.shape)} beside tokens {list(shape)}"
    if not width or not num_requests:
        return None
    for name, values in (("tokens", tokens), ("sizes", sizes), ("parents", draft.parents)):
        if (
            values is not None
            and values.dtype is not torch.long
            and (values.is_floating_point() or values.is_complex())
        ):
            return f"{name} of {values.dtype}"
    lengths = sizes.tolist()  # a few numbers: one by one is sooner than arrays would be
    if min(lengths) < 0 or max(lengths) > width:
        return f"sizes {lengths} for drafts of {width} tokens"

    def real(values: torch.Tensor) -> list[list[Any]]:
        """The numbers that are no padding."""
        return [row[:n] for row, n in zip(values.tolist(), lengths, strict=True)]

    if any(row and (min(row) < 0 or max(row) >= vocab_size) for row in real(tokens)):
        return f"token ids outside 0 .. {vocab_size - 1}"
    if draft.parents is not None and not all(-1 <= p < k for row in real(draft.parents) for k, p in enumerate(row)):
        return "a draft token that does not come after its parent"
    if draft.confidence is not None and any(map(math.isnan, chain.from_iterable(real(draft.confidence)))):
        return "confidences that are no numbers"
    if draft.probs is not None:
        if draft.probs.shape != (*tokens.shape, vocab_size):
            return f"probs {list(draft.probs.shape)} beside tokens {list(tokens.shape)} and {vocab_size} token ids"
        (rows,) = together_on_device((tokens.long().clamp(0, vocab_size - 1),), draft.probs.device)
        drawn = draft.probs.gather(2, rows[..., None])[..., 0]
        if not all(p > 0 for row in real(drawn) for p in row):
            return "a draft token that its own law excludes"
    return None
