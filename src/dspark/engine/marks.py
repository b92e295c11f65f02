"""Which characters of a text came from accepted draft tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from dspark.engine.text import Detokenizer
from dspark.types import Delta


class DraftMarks:
    """Says which characters of streamed text came from accepted draft tokens.

    Text lags behind its tokens (unfinished characters, what may become a stop string), so characters are counted here
    token by token and matched with the text when it comes. `context` is what the text goes on from (Request.context).
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        self._detokenizer = Detokenizer(tokenizer, context)
        self._runs: deque[tuple[int, bool]] = deque()  # characters to come, and whether they were drafted

    def split(self, delta: Delta) -> Iterator[tuple[str, bool]]:
        """The text of one delta in runs of one kind."""
        for token_id, is_drafted in zip(delta.token_ids, delta.is_drafted, strict=True):
            if num_characters := len(self._detokenizer.push([token_id])):
                self._runs.append((num_characters, is_drafted))
        text = delta.text
        while text:
            num_characters, is_drafted = self._runs.popleft() if self._runs else (len(text), False)
            yield text[:num_characters], is_drafted
            if num_characters > len(text):
                self._runs.appendleft((num_characters - len(text), is_drafted))
            text = text[num_characters:]
