"""What is believed of a draft when nobody calibrates: the drafter's own word, or how earlier drafts fared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dspark.budget.prefix_scheduler import parent_survival, survival_of
from dspark.types import Draft, Request, StepRecord

_PRIOR_ACCEPTED, _PRIOR_TRIED = 3.6, 4.0  # optimistic: a drafter that is not tried is never known
_MOST_TRIED = 2000.0  # older outcomes count half, again and again, so that changing traffic is followed


class RawBeliefs:
    """Survival as the drafter's confidences have it; without them, running acceptance by depth.

    Acceptance counts tokens that were verified and whose ancestors were all accepted. Others carry no label: they were
    not refused, nobody asked.
    """

    def __init__(self) -> None:
        self.accepted, self.tried = torch.zeros(0, dtype=torch.double), torch.zeros(0, dtype=torch.double)

    def survival(self, draft: Draft, requests: Sequence[Request]) -> Tensor:
        return self.by_depth(draft) if draft.confidence is None else survival_of(draft, draft.confidence)

    def observe(self, record: StepRecord) -> None:
        if record.confidence is None:
            self.learn(record)

    def learn(self, record: StepRecord) -> None:
        """Count what was verified and what of it accepted, by depth."""
        if record.kept is None or record.accepted_nodes is None or not record.kept.shape[1] or not record.kept.any():
            return
        draft = Draft(record.kept, record.kept.sum(1), parents=record.parents)
        reached = record.kept & (parent_survival(draft, record.accepted_nodes.double()) > 0)
        depth = draft.depth
        self._grow(int(depth.max()))
        self.tried.index_add_(0, (depth - 1)[reached], torch.ones(int(reached.sum()), dtype=torch.double))
        right = (depth - 1)[record.accepted_nodes]
        self.accepted.index_add_(0, right, torch.ones(len(right), dtype=torch.double))
        fade = torch.where(self.tried > _MOST_TRIED, 0.5, 1.0)
        self.tried *= fade
        self.accepted *= fade

    def by_depth(self, draft: Draft) -> Tensor:
        """[B, K]  survival from running acceptance alone."""
        depth = draft.depth
        self._grow(int(depth.max()) if depth.numel() else 0)
        rate = (self.accepted + _PRIOR_ACCEPTED) / (self.tried + _PRIOR_TRIED)
        return survival_of(draft, rate[depth - 1])

    def _grow(self, depth: int) -> None:
        missing = torch.zeros(max(0, depth - len(self.tried)), dtype=torch.double)
        self.accepted, self.tried = torch.cat([self.accepted, missing]), torch.cat([self.tried, missing])
