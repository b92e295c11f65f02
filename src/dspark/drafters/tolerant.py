"""For serving: a drafter's faults cost speed, never answers. The target needs no draft to say what it says."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from dspark.target.target import Target
from dspark.types import Draft, Drafter, Request, Rule

log = logging.getLogger(__name__)

_MAX_LOGGED = 3  # faults with a traceback; later ones are only counted


class TolerantDrafter:
    """Asks `drafter`, and where that raises has the requests concerned decoded plainly from there on.

    num_faults   calls that raised; each is logged or, from the fourth on, only counted here
    is_drafting  False once `max_faults` calls in a row have raised: the drafter is not asked again
    """

    def __init__(self, drafter: Drafter, target: Target, max_faults: int = 20) -> None:
        self.drafter, self.target, self.max_faults = drafter, target, max_faults
        self.feature_layers, self.length = drafter.feature_layers, drafter.length
        self.num_faults = self._num_in_a_row = 0
        self.is_drafting = True
        self._given_up: set[int] = set()  # requests whose features the drafter has missed

    def __getattr__(self, name: str) -> Any:
        return getattr(self.drafter, name)  # what a drafter has besides the port, `compile` for one

    def propose(self, requests: Sequence[Request], rule: Rule) -> Draft:
        rows = [b for b, r in enumerate(requests) if r.id not in self._given_up]
        if not self.is_drafting or not rows:
            self._given_up.update(r.id for r in requests)
            return Draft.empty(len(requests))
        asked = [requests[b] for b in rows]
        try:
            draft = self.drafter.propose(asked, rule).on_host()
        except Exception as error:  # noqa: BLE001  # any fault of any drafter, a user's own file included
            self._note_fault(error)
            for request in asked:
                self._give_up(request)
            return Draft.empty(len(requests))
        self._num_in_a_row = 0
        return draft.among(rows, len(requests))

    def read(self, requests: Sequence[Request]) -> None:
        """Have features read without drafting, where the drafter can and has missed none."""
        if hasattr(self.drafter, "read") and (asked := [r for r in requests if r.id not in self._given_up]):
            self.drafter.read(asked)

    def release(self, request_id: int) -> None:
        self._given_up.discard(request_id)
        try:
            self.drafter.release(request_id)
        except Exception as error:  # noqa: BLE001
            self._note_fault(error)

    def _give_up(self, request: Request) -> None:
        self.release(request.id)
        self._given_up.add(request.id)
        # A drafter that writes into the target's cache may have been cut short before it tidied up.
        if self.target.cache.length(request.id) > request.num_cached:
            self.target.keep(request.id, request.num_cached, ())

    def _note_fault(self, error: Exception) -> None:
        self.num_faults += 1
        self._num_in_a_row += 1
        if self.num_faults <= _MAX_LOGGED:
            log.error("the drafter raised; its requests go on without drafts", exc_info=error)
        if self._num_in_a_row >= self.max_faults and self.is_drafting:
            self.is_drafting = False
            log.error("the drafter raised %d times in a row and is switched off: decoding is plain", self.max_faults)
