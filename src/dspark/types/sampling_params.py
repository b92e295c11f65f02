"""How tokens are drawn: what a user may ask for, and what an output may look like."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral, Real
from typing import Protocol

from torch import Tensor

from dspark.errors import InvalidRequest

# Of any number here, in size: single precision has room for what several of them make together, and far beyond any use.
_LARGEST = 1e6


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
    max_tokens           tokens to generate at most, the prompt not counted; 0 only with prompt_logprobs
    min_tokens           no end token, stop token or stop string ends the text before so many
    stop                 strings that end the text; they are not part of it
    stop_token_ids       token ids that end it, besides the target's own end tokens
    ignore_eos           go on past the target's own end tokens
    seed                 same seed, same text, with and without speculation; None draws one
    traffic_class        name of the kind of traffic it belongs to, for beliefs of its own; None shares everyone's
    logprobs             report the target's log-probabilities of the chosen and the n likeliest tokens; None reports none
    prompt_logprobs      the same of the prompt's tokens but the first, in place of a look into the prefix cache
    grammar              tokens that it excludes are never drawn; None excludes none

    Raises InvalidRequest, a ValueError, for a value that cannot be meant.
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
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    traffic_class: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            self._require(name, _is_number(getattr(self, name)), "a number")
        for name in ("top_k", "max_tokens", "min_tokens"):
            self._require(name, _is_integer(getattr(self, name)), "an integer")
        for name in ("seed", "logprobs", "prompt_logprobs"):
            self._require(name, getattr(self, name) is None or _is_integer(getattr(self, name)), "None or an integer")
        self._require("temperature", 0 <= self.temperature <= _LARGEST, f"0 to {_LARGEST:g}")
        self._require("top_k", self.top_k >= 0, "0 (all tokens) or more")
        self._require("top_p", 0 < self.top_p <= 1, "in (0, 1]")
        self._require("min_p", 0 <= self.min_p <= 1, "in [0, 1]")
        is_factor = 1 / _LARGEST <= self.repetition_penalty <= _LARGEST
        self._require("repetition_penalty", is_factor, f"{1 / _LARGEST:g} to {_LARGEST:g}")
        for name in ("presence_penalty", "frequency_penalty"):
            self._require(name, abs(getattr(self, name)) <= _LARGEST, f"{-_LARGEST:g} to {_LARGEST:g}")
        is_enough = self.max_tokens >= (1 if self.prompt_logprobs is None else 0)
        self._require("max_tokens", is_enough, "1 or more (with prompt_logprobs 0 or more)")
        self._require("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "0 to max_tokens")
        for name in ("logprobs", "prompt_logprobs"):
            self._require(name, (getattr(self, name) or 0) >= 0, "None, 0 or more")
        is_by_token = isinstance(self.logit_bias, Mapping) and all(
            _is_integer(token) and _is_number(bias) and abs(bias) <= _LARGEST for token, bias in self.logit_bias.items()
        )
        self._require("logit_bias", is_by_token, f"numbers from {-_LARGEST:g} to {_LARGEST:g} by token id")
        are_strings = isinstance(self.stop, Sequence) and all(isinstance(s, str) and s for s in self.stop)
        self._require("stop", are_strings, "strings that are not empty")
        are_ids = isinstance(self.stop_token_ids, Collection) and all(map(_is_integer, self.stop_token_ids))
        self._require("stop_token_ids", are_ids, "token ids")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise InvalidRequest(f"{name} must be {expected}; got {getattr(self, name)!r}")

    @cached_property
    def penalises(self) -> bool:
        """Whether the law at a position depends on which tokens came before it, beyond what the target sees."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @cached_property
    def reshapes(self) -> bool:
        """Whether the law is more than the logits at a temperature."""
        is_cut = self.top_k > 0 or self.top_p < 1 or self.min_p > 0 or self.grammar is not None
        return bool(self.logit_bias) or self.penalises or is_cut or self.min_tokens > 0


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
