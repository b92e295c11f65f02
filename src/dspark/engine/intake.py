"""What an engine takes, known wherever requests are made of prompts: beside it, or in another process."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from itertools import count
from typing import Any

from dspark.engine.text import Prompt, render_prompt
from dspark.errors import InvalidRequest, PromptTooLong
from dspark.types import Request, SamplingParams

_request_ids = count()  # shared, because engines may share a target and with it the cache


@dataclass(frozen=True)
class Intake:
    """Checks prompts and makes requests of them.

    tokenizer      None: prompts are token ids
    vocab_size     token ids are below it
    max_length     tokens of prompt and output
    end_token_ids  that end an output
    """

    tokenizer: Any
    vocab_size: int
    max_length: int
    end_token_ids: tuple[int, ...]

    def prepare(self, prompt: Prompt, params: SamplingParams, raw: bool = False) -> Request:
        """A checked request with an id and a seed of its own. Raises InvalidRequest."""
        tokens = self._tokenise(prompt, params, raw)
        seed = secrets.randbits(63) if params.seed is None else int(params.seed)  # noise takes 64 bits of it
        ending = tuple(t for t in params.stop_token_ids if 0 <= t < self.vocab_size)
        ending += () if params.ignore_eos else tuple(t for t in self.end_token_ids if t < self.vocab_size)
        return Request(next(_request_ids), tokens, params, len(tokens), seed=seed, ending_ids=ending, is_raw=raw)

    def _tokenise(self, prompt: Prompt, params: SamplingParams, raw: bool) -> list[int]:
        tokens = render_prompt(self.tokenizer, prompt, raw)
        outside = [t for t in (*tokens, *params.logit_bias) if not 0 <= t < self.vocab_size]
        if outside:
            raise InvalidRequest(f"token ids must be in 0 .. {self.vocab_size - 1}; got {outside[0]}")
        if len(tokens) >= self.max_length:
            raise PromptTooLong(
                f"the prompt has {len(tokens)} tokens, but this engine holds {self.max_length} with at least one to "
                "generate: shorten the prompt, or use a target with a longer context or more slots"
            )
        if params.stop and self.tokenizer is None:
            raise InvalidRequest("stop strings need a tokenizer, and this target has none: use stop_token_ids")
        return tokens
