"""One sequence being generated, and what its user gets of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from dspark.transfer import on_device
from dspark.types.sampling_params import Matcher, SamplingParams

_NUM_CONTEXT = 8  # tokens before a text that can change how its first ones are decoded


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


class FeaturePiece:
    """One request's part of the features [T, F] of a step: first .. first+num-1, or `rows` where they are no run.

    It is cut out when somebody reads it, which for most pieces is never.
    """

    __slots__ = ("features", "first", "num", "rows")

    def __init__(self, features: Tensor, first: int, num: int, rows: Sequence[int] | None = None) -> None:
        self.features, self.first, self.num, self.rows = features, first, num, rows

    def __len__(self) -> int:
        return self.num

    def after(self, num: int) -> FeaturePiece:
        """What is left without the first `num`."""
        rows = None if self.rows is None else self.rows[num:]
        return FeaturePiece(self.features, self.first + num, self.num - num, rows)

    @property
    def places(self) -> Sequence[int]:
        """[num]  rows of `features`."""
        return range(self.first, self.first + self.num) if self.rows is None else self.rows

    @property
    def cut(self) -> Tensor:
        """[num, F]"""
        if self.rows is not None:
            return self.features[on_device(self.rows, self.features.device)]
        return (
            self.features if self.num == self.features.shape[0] else self.features[self.first : self.first + self.num]
        )


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
    feature_pieces: list[FeaturePiece] = field(default_factory=list, repr=False)  # newer ones, not yet joined to these
    rounds: list[Round] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # from the second token on, where asked for
    is_drafted: list[bool] = field(default_factory=list)  # per generated token: an accepted draft token?
    finish_reason: str | None = None
    text: Any = field(default=None, repr=False)  # the engine's running translation into text
    ending_ids: tuple[int, ...] = ()  # tokens that end it, and are excluded before params.min_tokens
    matcher: Matcher | None = field(default=None, repr=False)  # of params.grammar
    is_raw: bool = False  # its text goes on from the prompt's, with the space between them
    has_begun: bool = False  # was looked up in a prefix cache
    num_prompt_found: int = 0  # prompt tokens that a prefix cache spared the target

    @cached_property
    def kind(self) -> tuple[str | None, bool]:
        """Requests of one kind are expected to fare alike. Texts that take the likeliest token, nearly, are far easier to guess."""
        return self.params.traffic_class, self.params.temperature < 0.5

    @property
    def pending(self) -> list[int]:
        """Committed tokens the target has not read: just the anchor, except while the prompt is being read."""
        return self.tokens[self.num_cached :]

    @property
    def context(self) -> list[int]:
        """The prompt's last tokens where the text goes on from them; none before a turn of a chat, which begins anew."""
        end = self.num_prompt_tokens
        return self.tokens[max(0, end - _NUM_CONTEXT) : end] if self.is_raw else []

    @property
    def looks_back(self) -> bool:
        """Whether the law at a position depends on the very tokens before it, beyond what a model makes of them."""
        return self.params.penalises or self.matcher is not None

    @property
    def generated(self) -> list[int]:
        """Tokens after the prompt."""
        return self.tokens[self.num_prompt_tokens :]


@dataclass(frozen=True)
class Generation:
    """What the user gets for one prompt.

    text, token_ids  the answer, without the prompt; the text ends before a stop string
    finish_reason    `stop` (an end token or a stop string), `length`, `cancelled`, `error`, or `unfinished` so far
    rounds           a Round per target pass after the prompt
    logprobs         per token, if SamplingParams asked for them
    prompt_logprobs  per prompt token from the second on, if SamplingParams asked for them
    is_drafted       per token: was it an accepted draft token?
    seed             what to give as SamplingParams(seed=...) to get the same text again
    """

    prompt_token_ids: list[int] = field(repr=False)
    token_ids: list[int] = field(repr=False)
    text: str
    finish_reason: str
    rounds: list[Round] = field(repr=False)
    logprobs: list[TokenLogprobs] | None = field(default=None, repr=False)
    prompt_logprobs: list[TokenLogprobs] | None = field(default=None, repr=False)
    is_drafted: list[bool] = field(default_factory=list, repr=False)
    seed: int = 0

    @property
    def tau(self) -> float:
        """Tokens committed per target pass after the prompt, the bonus token included."""
        return sum(r.accepted + 1 for r in self.rounds) / len(self.rounds) if self.rounds else 1.0


class Delta(NamedTuple):  # of which there are many: a frozen dataclass takes three times as long to make
    """What one step added to a streamed request.

    text           what can be said already: it may lag behind token_ids, since a character or a stop string may be half there
    is_drafted     per token: was it an accepted draft token?
    finish_reason  None until the last one
    fault          why its grammar could not be followed to its end
    """

    text: str
    token_ids: list[int]
    is_drafted: list[bool]
    finish_reason: str | None = None
    logprobs: Sequence[TokenLogprobs] = ()
    fault: str | None = None
