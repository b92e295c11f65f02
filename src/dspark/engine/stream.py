"""A request as text: while it grows, for a stream, and once it has ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dspark.engine.text import Detokenizer, StopStrings
from dspark.types import Delta, Generation, Request

if TYPE_CHECKING:
    from dspark.engine.engine import Engine


class Stream(Iterator[Delta]):
    """The text of one request as it comes. `generation` is what there is so far; `close` cancels what is left.

    Leaving the loop early (`break`, an exception, Ctrl-C) cancels it too, once nobody holds the stream any more.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine, self.request = engine, request
        self._deltas = _deltas(engine, request)

    def __next__(self) -> Delta:
        return next(self._deltas)

    def __del__(self) -> None:  # one that nobody has begun to read, too
        self._engine.abandon(self.request)

    def __repr__(self) -> str:
        return f"Stream({len(self.request.generated)} tokens so far, {self.request.finish_reason or 'unfinished'})"

    @property
    def generation(self) -> Generation:
        """What there is so far."""
        return self._engine.result(self.request)

    def close(self) -> None:
        """Cancel what is left."""
        self._engine.cancel(self.request)


def _deltas(engine: Engine, request: Request) -> Iterator[Delta]:
    """Not a method: it would hold the stream, which then would not end as soon as nobody else does."""
    num_seen = 0
    try:
        while request.finish_reason is None or num_seen < len(request.generated):
            while request.finish_reason is None and len(request.generated) == num_seen:
                engine.step()
            if request.finish_reason == "cancelled":
                return
            is_last, tokens = request.finish_reason is not None, request.generated[num_seen:]
            is_drafted, logprobs = request.is_drafted[num_seen:], request.logprobs[num_seen:]
            num_seen += len(tokens)
            text = "" if request.text is None else request.text.take(tokens, is_last)
            yield Delta(text, tokens, is_drafted, request.finish_reason, logprobs)
    finally:
        engine.abandon(request)


class RunningText:
    """Text of one request. Tokens become text as they come only where a stop string or a stream needs it.

    num_unwatched  first tokens, in which no stop string is looked for
    context        the tokens that the text goes on from (Request.context)
    """

    def __init__(
        self, tokenizer: Any, stop: tuple[str, ...], num_unwatched: int = 0, context: Sequence[int] = ()
    ) -> None:
        self._tokenizer, self._stop, self._context = tokenizer, stop, list(context)
        self._num_unwatched = num_unwatched
        self._detokenizer, self._stop_strings = Detokenizer(tokenizer, context), StopStrings(stop)
        self._untaken = self._whole = ""

    def push(self, token: int) -> bool:
        """Add a token if stop strings are watched for; whether one is now complete."""
        if not self._stop:
            return False
        piece = self._detokenizer.push([token])
        if self._num_unwatched:
            self._num_unwatched -= 1
            self._add(piece)
            return False
        self._add(self._stop_strings.push(piece))
        return self._stop_strings.found is not None

    def take(self, tokens: list[int], is_last: bool) -> str:
        """What a stream shows next, given the tokens that came since it last asked."""
        if not self._stop:
            piece = self._detokenizer.push(tokens)
            return piece + self._detokenizer.flush() if is_last else piece
        piece, self._untaken = self._untaken, ""
        return piece

    def finish(self) -> None:
        """No token follows: what was held back as the possible start of a stop string is text after all."""
        if self._stop:
            self._add(self._stop_strings.push(self._detokenizer.flush()) + self._stop_strings.flush())

    def everything(self, tokens: list[int]) -> str:
        """The text so far, streamed or not."""
        if self._stop:
            return self._whole
        return self._decode([*self._context, *tokens])[len(self._decode(self._context)) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _add(self, piece: str) -> None:
        self._untaken += piece
        self._whole += piece
