"""Grammars by llguidance: JSON schemas and function calls as masks over the vocabulary."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher
from torch import Tensor

from dspark.errors import InvalidRequest

# Between the parts of JSON: a space, or a new line and its indentation. With more, a model can write blanks for ever.
_JSON_OPTIONS: Any = {"whitespace_pattern": r"( |\n {0,16})?"}

_MOST_OF_COMPLAINT = 300  # characters


class Grammars:
    """Compiles grammars for one tokenizer. Building it takes a moment; requests then share it, from any thread."""

    def __init__(self, tokenizer: Any, vocab_size: int, end_token_ids: Sequence[int]) -> None:
        self._vocab_size, self._end_token_ids = vocab_size, end_token_ids
        self._tokenizer = llguidance.hf.from_tokenizer(
            tokenizer, n_vocab=max(vocab_size, len(tokenizer)), eos_token=list(end_token_ids) or None
        )

    def json_schema(self, schema: Mapping[str, Any] | bool) -> JsonGrammar:
        """Any JSON value that the schema admits. Raises InvalidRequest for one that is wrong or not supported."""
        text = json.dumps({} if schema is True else schema)
        try:
            grammar = LLMatcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS)
        except ValueError as error:  # `false`, or nested too deeply
            raise InvalidRequest(f"the schema cannot be used as a grammar: {error}") from error
        return self.compile(grammar)

    def calls(self, functions: Mapping[str, Mapping[str, Any]]) -> JsonGrammar:
        """{"name": ..., "arguments": ...} for one of the functions, given as name -> schema of its arguments."""
        rules = ["start: " + " | ".join(f"call{i}" for i in range(len(functions)))]
        for i, (name, schema) in enumerate(functions.items()):
            before = json.dumps('{"name": ' + json.dumps(name) + ', "arguments": ')
            options = json.dumps({**schema, "x-guidance": _JSON_OPTIONS})
            rules.append(f'call{i}: {before} %json {options} "}}"')
        return self.compile(LLMatcher.grammar_from_lark("\n".join(rules)))

    def compile(self, text: str) -> JsonGrammar:
        """A grammar by its `text`, which another process may have found good."""
        matcher = LLMatcher(self._tokenizer, text)
        if matcher.is_error():
            raise InvalidRequest(f"the schema cannot be used as a grammar: {_complaint(matcher)}")
        beginning = matcher.deep_copy()
        beginning.compute_bitmask()
        if beginning.is_error():  # such as {"$ref": "#"}, which says nothing of itself
            raise InvalidRequest(f"the schema cannot be used as a grammar: no text begins it ({_complaint(beginning)})")
        return JsonGrammar(text, matcher, self._vocab_size, self._end_token_ids)


class JsonGrammar:
    """A compiled grammar; see `dspark.types.Grammar`. `Grammars.compile(text)` makes it again elsewhere."""

    def __init__(self, text: str, prototype: LLMatcher, vocab_size: int, end_token_ids: Sequence[int]) -> None:
        self.text = text
        self._prototype, self._vocab_size, self._end_token_ids = prototype, vocab_size, list(end_token_ids)

    def matcher(self) -> JsonMatcher:
        return JsonMatcher(self._prototype.deep_copy(), self._vocab_size, self._end_token_ids)


class JsonMatcher:
    """Follows one request along its draft paths: back to where two paths part, then on. See `dspark.types.Matcher`.

    fault  why the grammar could not be followed to its end; the output is cut off there, and other requests go on
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, end_token_ids: list[int]) -> None:
        self._matcher, self._vocab_size, self._end_token_ids = matcher, vocab_size, end_token_ids
        self.fault: str | None = None
        self._read: list[int] = []  # tokens that the matcher has consumed

    def allowed(self, tokens: Sequence[int]) -> Tensor:
        if self.fault is None and not self._go_to(tokens):
            return torch.ones(self._vocab_size, dtype=torch.bool)
        if self.fault is None and not self._matcher.is_stopped():
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            if not self._matcher.is_error():
                return torch.from_numpy(np.unpackbits(bits, count=self._vocab_size, bitorder="little").astype(bool))
            self.fault = _complaint(self._matcher)  # a schema can be too expensive to follow
        mask = torch.zeros(self._vocab_size, dtype=torch.bool)
        mask[self._end_token_ids or slice(None)] = True
        return mask

    def _go_to(self, tokens: Sequence[int]) -> bool:
        """Bring the matcher behind `tokens`; False where the grammar excludes them."""
        num_common = _num_common(self._read, tokens)
        if num_common < len(self._read):
            self._matcher.rollback(len(self._read) - num_common)
            del self._read[num_common:]
        rest = list(tokens[num_common:])
        num_read = self._matcher.try_consume_tokens(rest) if rest else 0
        self._read += rest[:num_read]
        return num_read == len(rest)


def _complaint(matcher: LLMatcher) -> str:
    """What is wrong, in a line, without the state that follows it."""
    said, _, _ = (matcher.get_error() or "unknown error").partition("<state>")
    return " ".join(said.split())[:_MOST_OF_COMPLAINT]


def _num_common(a: Sequence[int], b: Sequence[int]) -> int:
    length = min(len(a), len(b))
    if list(a[:length]) == list(b[:length]):
        return length
    return next(i for i in range(length) if a[i] != b[i])
