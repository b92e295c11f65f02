"""The nouns. Everything else in the package is a verb over these.

A *drafter* proposes, the *prefix scheduler* chooses how much to check, the *target* reads it in one pass,
*verify* decides, the *engine* commits.

    target       the model whose output the user wants
    anchor       last committed token; not yet in the target's cache
    draft        the tokens proposed in one step: per request a chain or a tree rooted at its anchor
    confidence   P(draft token k is accepted, given its ancestors are), known before token k is drawn
    survival     product of the confidences along the path
    budget       how many draft tokens the target reads this step
    keep         mask of the draft tokens chosen for reading, closed under ancestors
    verdict      the accepted path and one next token per request
    span         tokens appended to one request's cached prefix in one forward
    slot         KV storage of one token
    features     target hidden states that a drafter conditions on
    block        a parallel drafter's block of positions, and nothing else
    tau          tokens committed per target pass, the bonus token included; num_accepted counts draft tokens only

Shape letters: B requests, K draft tokens per request, V vocabulary, T tokens in one forward, R rows with logits,
F feature width, H hidden size, D head size, S cached tokens of one request, N a number of rows otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Protocol

import torch
from torch import Tensor

from dspark.errors import InvalidRequest


class Matcher(Protocol):
    """A grammar at work on one request. It may keep state between calls, but its answers depend on `tokens` alone."""

    def allowed(self, tokens: Sequence[int]) -> Tensor:
        """[V] bool, on the host: which tokens may follow `tokens`, the output so far with a draft path or a part of it.

        After tokens that the grammar excludes, all of them: nobody gets there.
        """
        ...


class Grammar(Protocol):
    """What an output may look like; end tokens are allowed where it may end. Immutable, so requests may share one.

    text  says it all, for whoever makes the same grammar elsewhere
    """

    text: str

    def matcher(self) -> Matcher:
        """A matcher for one request."""
        ...


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. The defaults are the target's own law: temperature 1 and nothing cut off.

    temperature          0 is greedy; the limit of the same rule, not another mode
    top_k                keep the k likeliest tokens; 0 keeps all
    top_p                keep the smallest set of likeliest tokens with at least this mass
    min_p                keep tokens at least this fraction as likely as the likeliest
    repetition_penalty   of tokens in prompt or output: positive logits are divided by it, negative ones multiplied
    presence_penalty     subtracted from the logit of every token already in the output
    frequency_penalty    subtracted once per occurrence in the output
    logit_bias           {token id: added to its logit}
    max_tokens           tokens to generate at most, the prompt not counted
    stop                 strings that end the text; they are not part of it
    stop_token_ids       token ids that end it, besides the target's own end tokens
    ignore_eos           go on past the target's own end tokens
    seed                 same seed, same text, with and without speculation; None draws one
    traffic_class        name of the kind of traffic it belongs to, for beliefs of its own; None shares everyone's
    logprobs             report the target's log-probabilities of the chosen and the n likeliest tokens; None reports none
    grammar              tokens that it excludes are never drawn; None excludes none
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    grammar: Grammar | None = None
    traffic_class: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            self._require(name, isinstance(getattr(self, name), Real), "a number")
        for name in ("top_k", "max_tokens"):
            self._require(name, _is_integer(getattr(self, name)), "an integer")
        for name in ("seed", "logprobs"):
            self._require(name, getattr(self, name) is None or _is_integer(getattr(self, name)), "None or an integer")
        self._require(
            "temperature", self.temperature >= 0 and math.isfinite(self.temperature), "a finite number, 0 or more"
        )
        self._require("top_k", self.top_k >= 0, "0 (all tokens) or more")
        self._require("top_p", 0 < self.top_p <= 1, "in (0, 1]")
        self._require("min_p", 0 <= self.min_p <= 1, "in [0, 1]")
        self._require(
            "repetition_penalty",
            self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty),
            "a finite number above 0",
        )
        self._require("presence_penalty", math.isfinite(self.presence_penalty), "a finite number")
        self._require("frequency_penalty", math.isfinite(self.frequency_penalty), "a finite number")
        self._require("max_tokens", self.max_tokens >= 1, "1 or more")
        self._require("logprobs", self.logprobs is None or self.logprobs >= 0, "None, 0 or more")
        is_by_token = all(
            _is_integer(token) and isinstance(bias, Real) and math.isfinite(bias)
            for token, bias in self.logit_bias.items()
        )
        self._require("logit_bias", is_by_token, "finite numbers by token id")
        are_strings = isinstance(self.stop, Sequence) and all(isinstance(s, str) and s for s in self.stop)
        self._require("stop", are_strings, "strings that are not empty")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise InvalidRequest(f"{name} must be {expected}; got {getattr(self, name)!r}")

    @property
    def penalises(self) -> bool:
        """Whether the law at a position depends on which tokens came before it, beyond what the target sees."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def reshapes(self) -> bool:
        """Whether the law is more than the logits at a temperature."""
        is_cut = self.top_k > 0 or self.top_p < 1 or self.min_p > 0 or self.grammar is not None
        return bool(self.logit_bias) or self.penalises or is_cut


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


@dataclass(frozen=True)
class Round:
    """One target pass of one request after its prompt: draft tokens proposed, read by the target, and accepted.

    is_cut_short  of a tree: no token was read after the last accepted one. None: a chain, whose tokens are read in a row
    """

    drafted: int
    verified: int
    accepted: int
    is_cut_short: bool | None = None

    @property
    def reached(self) -> int:
        """Positions of the draft that were judged: those accepted, and the next one if any token was read there."""
        is_cut_short = self.verified == self.accepted if self.is_cut_short is None else self.is_cut_short
        return self.accepted + (not is_cut_short)


@dataclass(frozen=True)
class TokenLogprobs:
    """The target's own log-probabilities at one position, before temperature, penalties and cuts."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # likeliest first


@dataclass(eq=False)
class Request:
    """One sequence being generated.

    Every token but the last (the anchor) is in the target's cache once the prompt has been read.
    features [n, F] are those of positions features_start .. num_cached-1, kept until the drafter has been asked once.
    """

    id: int
    tokens: list[int]
    params: SamplingParams
    num_prompt_tokens: int
    seed: int = 0
    num_cached: int = 0
    features: Tensor | None = None
    features_start: int = 0
    feature_pieces: list[Tensor] = field(default_factory=list, repr=False)  # newer features, not yet joined to these
    num_loose: int = 0  # of the pieces, the last ones that were not joined among themselves
    rounds: list[Round] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    is_drafted: list[bool] = field(default_factory=list)  # per generated token: an accepted draft token?
    finish_reason: str | None = None
    text: Any = field(default=None, repr=False)  # the engine's running translation into text
    matcher: Matcher | None = field(default=None, repr=False)  # of params.grammar
    num_prompt_found: int = 0  # prompt tokens that a prefix cache spared the target

    @property
    def pending(self) -> list[int]:
        """Committed tokens the target has not read: just the anchor, except while the prompt is being read."""
        return self.tokens[self.num_cached :]

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.num_prompt_tokens :]


@dataclass
class Draft:
    """Proposed continuations of B requests.

    tokens      [B, K]     proposed ids, parents before children
    sizes       [B]        how many of the K are real
    confidence  [B, K]     P(accepted | ancestors accepted), fixed before the token is drawn; None: unknown
    parents     [B, K]     index of the predecessor, -1 for the anchor; None: a chain
    probs       [B, K, V]  law each token was drawn from (only the rejection rule asks); None: picked outright
    """

    tokens: Tensor
    sizes: Tensor
    confidence: Tensor | None = None
    parents: Tensor | None = None
    probs: Tensor | None = None

    @classmethod
    def empty(cls, num_requests: int) -> Draft:
        """Nothing proposed: plain decoding."""
        return cls(torch.zeros(num_requests, 0, dtype=torch.long), torch.zeros(num_requests, dtype=torch.long))

    def on_host(self) -> Draft:
        """The same with everything that the host decides on in its memory; the laws stay where they are."""
        confidence = None if self.confidence is None else self.confidence.float().cpu()
        parents = None if self.parents is None else self.parents.cpu()
        return Draft(self.tokens.cpu(), self.sizes.cpu(), confidence, parents, self.probs)

    def among(self, rows: Sequence[int], num_requests: int) -> Draft:
        """The same proposals as `rows` of a batch of num_requests; the other requests have none."""
        if len(rows) == num_requests:
            return self

        def spread(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            out = values.new_zeros(num_requests, *values.shape[1:])
            out[list(rows)] = values
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
        return torch.arange(self.tokens.shape[1], device=self.sizes.device)[None] < self.sizes[:, None]


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


@dataclass
class StepRecord:
    """All that monitoring, calibration and evaluation may read of one engine step.

    The lists have one entry per decoding request. kept, accepted_nodes, survival and parents are [B, K] as in Draft;
    accepted_nodes are the draft tokens that the target agreed with, also where the request ended before them.
    Predictions are what the engine believed before the target ran; 0 seconds: nothing was believed yet.
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
        return self.seconds.get("draft", 0.0)


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


@dataclass(frozen=True)
class Generation:
    """What the user gets for one prompt."""

    prompt_token_ids: list[int] = field(repr=False)
    token_ids: list[int] = field(repr=False)
    text: str
    finish_reason: str
    rounds: list[Round] = field(repr=False)
    logprobs: list[TokenLogprobs] | None = field(default=None, repr=False)
    is_drafted: list[bool] = field(default_factory=list, repr=False)
    seed: int = 0

    @property
    def tau(self) -> float:
        """Tokens committed per target pass after the prompt, the bonus token included."""
        return sum(r.accepted + 1 for r in self.rounds) / len(self.rounds) if self.rounds else 1.0


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
        return self.token_seconds[0] if self.token_seconds else None


@dataclass(frozen=True)
class Delta:
    """What one step added to a streamed request. fault: why its grammar could not be followed to its end."""

    text: str
    token_ids: list[int]
    is_drafted: list[bool]
    finish_reason: str | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    fault: str | None = None


class Rule(Protocol):
    """How drafters draw and how drafts are judged; the two belong together (verify.py has both rules)."""

    allows_anticipation: bool  # lossless whatever the scheduler looks at
    reports_chances: bool  # whether somebody wants verdicts with `chances`

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
    """Chooses how much of a draft is verified. `anticipates`: a choice may depend on the token it is about, or on later ones."""

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


Observer = Callable[[StepRecord], Any]
RequestObserver = Callable[[RequestRecord], Any]
