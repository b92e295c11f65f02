"""What may be known of a step and of a request by those who watch and those who learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dspark.types.request import Round
from dspark.types.sampling_params import SamplingParams


@dataclass(frozen=True)
class Load:
    """What a step costs besides the draft tokens that will be verified.

    base_tokens        read whatever is chosen: the anchors of the decoding requests and prompt chunks
    num_requests       requests in the step, those that read prompts included
    context_tokens     cached already, over all of them
    draft_seconds      what drafting took, or is believed to have taken
    num_prompt_tokens  of the base tokens, those of prompts
    """

    base_tokens: int
    num_requests: int = 1
    context_tokens: int = 0
    draft_seconds: float = 0.0
    num_prompt_tokens: int = 0


@dataclass
class StepRecord:
    """All that monitoring, calibration and evaluation may read of one engine step.

    The lists have one entry per decoding request. kept, accepted_nodes, survival and parents are [B, K] as in Draft;
    accepted_nodes are the draft tokens that the target agreed with, also where the request ended before them.
    Predictions, survival among them, are what the engine believed before the target ran; 0 seconds: nothing was believed
    yet. Where nobody watches, they are not made but for survival and the seconds of drafting, and where the scheduler heeds
    no beliefs, as with a fixed length, or spares the choice (budget/sparing.py), these are not either: 0 and None.
    """

    request_ids: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    verified: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    confidence: Tensor | None = None  # [B, K] as the drafter gave it
    survival: Tensor | None = None  # [B, K] as believed when the scheduler chose
    kept: Tensor | None = None
    chosen: Tensor | None = None  # [B, K] the scheduler's own choice, where more was kept to learn from it
    accepted_nodes: Tensor | None = None
    chances: Tensor | None = None  # [B, K] of being accepted, as far as the rule knows them (Verdict)
    parents: Tensor | None = None  # None: chains
    load: Load | None = None  # what the scheduler was told
    num_asked: int = 0  # requests that the drafter was asked about
    num_unread: int = 0  # committed positions whose features the drafter had not read, over all of them
    skip_reason: str | None = None  # why requests with room for drafts were not drafted for
    num_skipped: int = 0  # how many they were
    num_faults: int = 0  # requests that lost their drafts because the drafter failed on them
    num_tokens: int = 0  # read by the target
    num_context_tokens: int = 0  # cached before the step, over all requests in it
    predicted_accepted: float = 0.0
    predicted_seconds: float = 0.0  # of everything but drafting
    predicted_draft_seconds: float = 0.0
    rate: float = 0.0  # tokens per second of what was chosen, its seconds as believed; 0: not known
    best_rate: float = 0.0  # and of the best choice in hindsight (budget/hindsight.py)
    num_prompt_tokens: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_free_slots: int = 0
    num_preempted: int = 0
    num_prefix_asked: int = 0  # prompt tokens of requests that began in this step, looked up in the prefix cache
    num_prefix_found: int = 0  # of which the target need not read
    seconds: dict[str, float] = field(
        default_factory=dict
    )  # by phase: admit, draft, schedule, target, verify, commit, learn

    @property
    def step_seconds(self) -> float:
        """Measured seconds of everything but drafting."""
        return sum(self.seconds.values()) - self.draft_seconds

    @property
    def draft_seconds(self) -> float:
        """Measured seconds of drafting."""
        return self.seconds.get("draft", 0.0)


@dataclass(frozen=True)
class RequestRecord:
    """All that metrics, canaries and logs may read of one request once it has ended. Times are `time.monotonic()`.

    arrival_seconds      handed to the engine's worker
    start_seconds        the first step it took part in began; None: it ended while waiting
    first_token_seconds  its first token was committed; None: there was none
    token_seconds        per generated token; those of one step share theirs
    """

    request_id: int
    params: SamplingParams
    seed: int
    drafter: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    finish_reason: str
    rounds: list[Round]
    arrival_seconds: float
    start_seconds: float | None
    finish_seconds: float
    token_seconds: list[float]

    @property
    def first_token_seconds(self) -> float | None:
        """When the first token came, on the clock of the others; None: there is none."""
        return self.token_seconds[0] if self.token_seconds else None


Observer = Callable[[StepRecord], Any]
RequestObserver = Callable[[RequestRecord], Any]
