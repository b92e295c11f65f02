"""What goes back to the client: OpenAI's objects, whole and in pieces."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from pydantic_core import to_json

from dspark.types import Request, TokenLogprobs

_LEAST_LOGPROB = -9999.0  # JSON has no infinity


@dataclass(frozen=True)
class Head:
    """What every object of one answer repeats."""

    kind: str  # chat.completion or text_completion
    model: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._named(self.kind), "choices": choices, "usage": usage}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._of_chunks, "choices": choices}

    @cached_property
    def is_chat(self) -> bool:
        return self.kind == "chat.completion"

    @cached_property
    def _of_chunks(self) -> dict[str, Any]:
        return self._named(self.kind + ".chunk" if self.is_chat else self.kind)

    def _named(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl-" if self.is_chat else "cmpl-"
        return {"id": prefix + self.id, "object": kind, "created": self.created, "model": self.model}


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(data) + b"\n\n"  # several times as fast as `json`


def around_text(event: bytes) -> tuple[bytes, bytes]:
    """What comes before and after the text of an event, which is empty in this one: no other string follows it."""
    before, _, after = event.rpartition(b'""')
    return before, after


DONE = b"data: [DONE]\n\n"


def usage(requests: Sequence[Request], choices_per_prompt: int) -> dict[str, Any]:
    """Tokens of an answer; a prompt counts once, however many choices it has."""
    first = requests[::choices_per_prompt]
    prompt = sum(r.num_prompt_tokens for r in first)
    completion = sum(len(r.tokens) - r.num_prompt_tokens for r in requests)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(r.num_prompt_found for r in first)},
    }


def speculation(request: Request) -> dict[str, Any]:
    """What speculation did for one choice. Never under OpenAI's `accepted_prediction_tokens`, which means another thing."""
    rounds = request.rounds
    longest = max((r.accepted for r in rounds), default=0)
    return {
        "tau": round(sum(r.accepted + 1 for r in rounds) / len(rounds), 4) if rounds else 1.0,
        "target_passes": len(rounds),
        "drafted": sum(r.drafted for r in rounds),
        "verified": sum(r.verified for r in rounds),
        "accepted": sum(r.accepted for r in rounds),
        "accepted_per_position": [sum(r.accepted > k for r in rounds) for k in range(longest)],
        "seed": request.seed,
    }


class TokenNames:
    """Single tokens as text and bytes, for log-probabilities."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.text = lru_cache(2**14)(self._text)

    def _text(self, token_id: int) -> str:
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def bytes(self, token_id: int) -> list[int]:
        text = self.text(token_id)
        if "\N{REPLACEMENT CHARACTER}" not in text:
            return list(text.encode())
        piece = self._tokenizer.convert_ids_to_tokens([token_id])[0] or ""
        if len(piece) == 6 and piece.startswith("<0x"):
            return [int(piece[3:5], 16)]
        known = _bytes_of_characters()
        if all(character in known for character in piece):
            return [known[character] for character in piece]
        return list(text.encode())

    def chat_logprobs(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        def one(token_id: int, logprob: float) -> dict[str, Any]:
            return {"token": self.text(token_id), "logprob": _finite(logprob), "bytes": self.bytes(token_id)}

        content = [
            {**one(e.token_id, e.logprob), "top_logprobs": [one(t, p) for t, p in e.top]}  # likeliest first
            for e in entries
        ]
        return {"content": content, "refusal": None}

    def prompt_logprobs(self, request: Request) -> dict[str, Any]:
        """Of an echoed prompt, in the shape of `text_logprobs`; nothing comes before its first token, so that has none."""
        first = self.text(request.tokens[0])
        others, _ = self.text_logprobs(request.prompt_logprobs, len(first))
        alone = {"tokens": first, "token_logprobs": None, "top_logprobs": None, "text_offset": 0}
        return {name: [alone[name], *values] for name, values in others.items()}

    def text_logprobs(self, entries: Sequence[TokenLogprobs], offset: int) -> tuple[dict[str, Any], int]:
        """The older shape of /v1/completions, and the text offset after these tokens."""
        tokens, offsets = [self.text(e.token_id) for e in entries], []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(e.logprob) for e in entries],
            "top_logprobs": [{self.text(t): _finite(p) for t, p in e.top} for e in entries],
            "text_offset": offsets,
        }, offset


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LEAST_LOGPROB


@lru_cache(1)
def _bytes_of_characters() -> dict[str, int]:
    """Byte-level vocabularies write each byte as a printable character."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}
