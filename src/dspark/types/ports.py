"""What can be replaced: how to draw and judge, how to guess, how much to verify, and what to believe of drafts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from dspark.types.draft import Draft, Verdict
from dspark.types.records import Load, StepRecord
from dspark.types.request import Request


class Rule(Protocol):
    """How drafters draw and how drafts are judged; the two belong together (verify.py has both rules)."""

    allows_anticipation: bool  # lossless whatever the scheduler looks at
    reports_chances: bool  # whether somebody wants verdicts with `chances`
    draws_alike: bool  # from the same logits, `draft` draws what `verify` commits

    def draft(
        self, logits: Tensor, requests: Sequence[Request], previous: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor | None]:
        """Draw one draft token for each request, previous (B) being its draft so far.

        logits [B, V] -> tokens [B] and, if the rule will ask for it, the law they were drawn from [B, V].
        """
        ...

    def noise_ahead(self, requests: Sequence[Request], length: int) -> Tensor | None:
        """[B, length, V] or [1, 1, 1] such that drawing is argmax(logits + noise), for drafters that draw in one graph.

        None where that is not known beforehand: draw with `draft` then.
        """
        ...

    def outlook(self, logits: Tensor, requests: Sequence[Request], previous: Sequence[Sequence[int]]) -> Tensor:
        """How likely each token is to be accepted next, as the draft's logits [N, V] have it: [N, V] log-likelihoods.

        requests and previous (N): whose row it is, and its draft so far. For drafters that pick the likeliest few.
        """
        ...

    def verify(self, draft: Draft, keep: Tensor, logits: Tensor, requests: Sequence[Request]) -> Verdict:
        """Judge the draft tokens in keep [B, K] by the target's logits [R, V].

        Rows: for each request its anchor, then its kept draft tokens in order.
        """
        ...


class Drafter(Protocol):
    """Any way of guessing.

    feature_layers  target layers whose hidden states it wants, 0-based decoder layers; () for none
    length          the most draft tokens it ever proposes for one request; slots are counted with it

    What it may have besides: `compile()`, called when the engine compiles; `read(requests)`, which takes in features
    without drafting, for requests that it has not been asked about for long; `calibration` of its confidences;
    `leaves_chains`, true where every draft is a chain of `length` tokens and lies where the target is; `reads_pieces`, true
    where it takes new features from `request.feature_pieces`, which are not joined to `request.features` for it then.
    """

    feature_layers: tuple[int, ...]
    length: int

    def propose(self, requests: Sequence[Request], rule: Rule) -> Draft:
        """Guess what follows each request's anchor, drawing with `rule.draft`. Reads the requests, never changes them.

        A drafter is never told what was accepted: it compares what it has read with `request.tokens`. All of
        `request.features` must be read in this call; the engine drops them afterwards.
        """
        ...

    def release(self, request_id: int) -> None:
        """Forget a request: finished, cancelled, or to be prefilled again. Unknown ids are fine."""
        ...


class PrefixScheduler(Protocol):
    """Chooses how much of a draft is verified. `anticipates`: a choice may depend on the token it is about, or on later ones.

    One that also has `heeds_beliefs = False` never looks at survival, and may be given none.
    """

    anticipates: bool

    def choose(self, draft: Draft, survival: Tensor, load: Load) -> Tensor:
        """keep [B, K] bool, closed under ancestors and inside `draft.real`.

        survival [B, K]  P(token and all its ancestors are accepted) as believed; never rises along a path
        """
        ...


class Beliefs(Protocol):
    """How likely each draft token is to survive, learned from what happened to others."""

    def survival(self, draft: Draft, requests: Sequence[Request]) -> Tensor:
        """[B, K]  P(draft token and all its ancestors are accepted). Entry k may depend on tokens before k only."""
        ...

    def observe(self, record: StepRecord) -> None:
        """Learn from a step that has been decided."""
        ...
