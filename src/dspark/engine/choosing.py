"""Which tokens of a draft the target reads, and what the step is believed to cost and bring with them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, compress

import torch
from torch import Tensor

from dspark.budget.capacity import Capacity
from dspark.budget.prefix_scheduler import falling_survival
from dspark.errors import InvalidConfiguration
from dspark.types import Beliefs, Draft, Load, Observer, PrefixScheduler, Request, StepRecord

_UNHEEDED = torch.zeros(0, 0)  # what is believed, for a scheduler that does not look at it


def heeds_beliefs(scheduler: PrefixScheduler) -> bool:
    """Whether its choices depend on what is believed of drafts; a length that the user fixed does not."""
    return getattr(scheduler, "heeds_beliefs", True)


class Choosing:
    """One scheduler at work in an engine, with what it weighs.

    are_heeded  whether anybody who decides goes by what is believed of drafts
    observers   who read records. What a step is to cost and to bring is foretold for them only, and for those who read
                them later, where `foretells` is set; these go without where the choice is spared (budget/sparing.py)
    """

    def __init__(
        self,
        scheduler: PrefixScheduler,
        beliefs: Beliefs,
        capacity: Capacity,
        are_heeded: bool,
        observers: Sequence[Observer],
    ) -> None:
        self.scheduler, self.beliefs, self.capacity = scheduler, beliefs, capacity
        self.foretells, self.are_heeded, self.observers = False, are_heeded, observers
        self._can_spare = getattr(scheduler, "can_spare", _never)
        # A length that the user fixed is never exceeded.
        self._explores = hasattr(beliefs, "wants_whole") and heeds_beliefs(scheduler)

    def choose(self, record: StepRecord, draft: Draft, decoding: Sequence[Request], room: Sequence[int]) -> Tensor:
        """keep [B, K] of the draft, within the draft tokens that each request has room for; record says what it costs."""
        assert record.load is not None
        load = record.load
        record.num_tokens = load.base_tokens
        foretells, is_spared = self.foretells or bool(self.observers), False
        if draft.tokens.shape[1] == 0:
            keep = draft.real  # nothing
        else:
            is_spared = self.are_heeded and not self.observers and self._can_spare(draft)
            if (foretells or self.are_heeded) and not is_spared:
                record.predicted_draft_seconds = self.capacity.draft_seconds(record.num_asked, load.context_tokens)
                drafting = record.predicted_draft_seconds or record.draft_seconds
                load = Load(load.base_tokens, load.num_requests, load.context_tokens, drafting, load.num_prompt_tokens)
                record.load, record.survival = load, falling_survival(draft, self.beliefs.survival(draft, decoding))
            keep = self.scheduler.choose(draft, _UNHEEDED if record.survival is None else record.survival, load)
            if not isinstance(keep, torch.Tensor) or keep.dtype != torch.bool or keep.shape != draft.tokens.shape:
                raise InvalidConfiguration(_no_choice(self.scheduler, keep, draft))
            if min(room, default=0) < draft.tokens.shape[1]:
                keep = keep & (draft.depth <= torch.tensor(room)[:, None])
            if self._explores and record.survival is not None:
                record.chosen = keep
                if whole := self.beliefs.wants_whole(len(decoding)):  # type: ignore[attr-defined]  # _explores has asked
                    keep = keep.clone()
                    keep[whole] |= (draft.real & (draft.depth <= torch.tensor(room)[:, None]))[whole]
            kept = keep.tolist()
            record.num_tokens += sum(map(sum, kept))
            if foretells and record.survival is not None:
                record.predicted_accepted = sum(compress(chain(*record.survival.tolist()), chain(*kept)))
        if foretells and not is_spared and self.capacity.is_known and record.num_tokens:
            record.predicted_seconds = self.capacity.seconds_of(
                record.num_tokens, load.num_requests, load.context_tokens, load.num_prompt_tokens > 0
            )
        return keep


def _never(draft: Draft) -> bool:
    return False


def _no_choice(scheduler: PrefixScheduler, keep: object, draft: Draft) -> str:
    is_tensor = isinstance(keep, torch.Tensor)
    got = f"{keep.dtype} {list(keep.shape)}" if is_tensor else type(keep).__name__  # type: ignore[attr-defined]
    expected = f"which draft tokens the target reads, torch.bool {list(draft.tokens.shape)}"
    return f"{type(scheduler).__name__}.choose must give {expected}; it gave {got}"
