"""An answer under way: deltas of the engine into OpenAI's objects, whole or as server-sent events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dspark.engine.marks import DraftMarks
from dspark.serve.body import Body, Outbox, never
from dspark.serve.faults import ApiError
from dspark.serve.replies import DONE, Head, TokenNames, around_text, event, speculation, usage
from dspark.serve.run import Run, unless_gone
from dspark.serve.tools import Piece, Voice, merged
from dspark.serve.wire import StreamOptions
from dspark.types import Delta, Request


class Answer:
    """n choices for each of one or more prompts, in the order of `run.requests`.

    echoed  what each choice's text begins with: its prompt; none where that is not wanted
    """

    def __init__(
        self,
        head: Head,
        run: Run,
        names: TokenNames,
        voice: Callable[[], Voice],
        choices_per_prompt: int,
        marks: Callable[[Request], DraftMarks] | None = None,
        echoed: Sequence[str] = (),
    ) -> None:
        self.head, self.run, self._names, self._choices_per_prompt = head, run, names, choices_per_prompt
        self._voices = [voice() for _ in run.requests]
        self._offsets = [0] * len(run.requests)
        self._marks = None if marks is None else [marks(request) for request in run.requests]
        self._echoed = echoed
        self._usage_everywhere = False
        self._around: dict[
            int, tuple[bytes, bytes]
        ] = {}  # of a choice: what comes before and after the text of an event

    async def whole(self) -> dict[str, Any]:
        """The one object that a request without streaming gets."""
        pieces: list[list[Piece]] = [[] for _ in self.run.requests]
        reasons: list[str | None] = [None] * len(pieces)

        def take(index: int, delta: Delta) -> None:
            pieces[index] += self._pieces(index, delta)
            reasons[index] = self._reason(index, delta)

        await self.run.hand_out(take)
        return self.head.whole([self._choice(i, pieces[i], reasons[i]) for i in range(len(pieces))], self.usage)

    async def stream(self, options: StreamOptions, write: Callable[[bytes], Any]) -> None:
        """The same in pieces. An error after the first of them is an event, too."""
        self._usage_everywhere = options.include_usage and options.continuous_usage_stats
        if self.head.is_chat:
            for index in range(len(self.run.requests)):
                write(self._event(index, {"role": "assistant", "content": ""}))
        for index, text in enumerate(self._echoed):
            write(self._event(index, {"content": text}))
        try:
            await self.run.hand_out(lambda index, delta: write(self._delta_events(index, delta)))
            last = event({**self.head.chunk([]), "usage": self.usage}) if options.include_usage else b""
        except ApiError as error:
            last = event(error.body)
        write(last + DONE)

    @property
    def usage(self) -> dict[str, Any]:
        return usage(self.run.requests, self._choices_per_prompt)

    @property
    def log_fields(self) -> dict[str, Any]:
        """For the log: counts and reasons, no text."""
        requests, first = self.run.requests, self.run.first_delta
        return {
            "prompt_tokens": self.usage["prompt_tokens"],
            "completion_tokens": self.usage["completion_tokens"],
            "finish_reasons": [r.finish_reason for r in requests],
            "tau": [speculation(r)["tau"] for r in requests],
            "first_token_seconds": None if first is None else round(first - self.run.began, 4),
        }

    # -- pieces ----------------------------------------------------------------------------------------------------------

    def _pieces(self, index: int, delta: Delta) -> list[Piece]:
        voice = self._voices[index]
        pieces = list(voice.push(delta.text))
        return pieces + list(voice.finish()) if delta.finish_reason else pieces

    def _reason(self, index: int, delta: Delta) -> str | None:
        if delta.finish_reason is None:
            return None
        if delta.fault is not None:
            raise ApiError(500, f"the grammar could not be followed to its end: {delta.fault}", "response_format")
        has_called = self._voices[index].has_called and delta.finish_reason == "stop"
        return "tool_calls" if has_called else delta.finish_reason

    def _choice(self, index: int, pieces: list[Piece], reason: str | None) -> dict[str, Any]:
        request = self.run.requests[index]
        choice: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": None}
        message = merged(pieces)
        echoed = self._echoed[index] if self._echoed else ""
        choice |= {"message": message} if self.head.is_chat else {"text": echoed + (message["content"] or "")}
        if request.params.logprobs is not None:
            scored = self._names.prompt_logprobs(request) if self._echoed else None
            self._offsets[index] = sum(map(len, scored["tokens"])) if scored else 0
            own = self._logprobs(index, request.logprobs)
            choice["logprobs"] = {name: scored[name] + own[name] for name in own} if scored else own
        if self._marks is not None:
            choice["dspark"] = speculation(request)
        return choice

    def _delta_events(self, index: int, delta: Delta) -> bytes:
        if delta.finish_reason is None and not delta.logprobs and self._marks is None:  # as most are
            return b"".join([self._event(index, piece) for piece in self._voices[index].push(delta.text)])
        reason = self._reason(index, delta)
        pieces = self._pieces(index, delta)
        extra: dict[str, Any] = {}
        if delta.logprobs:
            extra["logprobs"] = self._logprobs(index, delta.logprobs)
        if self._marks is not None:
            extra["dspark"] = {"marks": list(self._marks[index].split(delta))}
        events = []
        if pieces or "logprobs" in extra:
            first, *others = pieces or [{"content": ""}]
            events = [self._event(index, first, **extra), *(self._event(index, piece) for piece in others)]
        if reason is not None:
            last = {"dspark": speculation(self.run.requests[index])} if self._marks is not None else {}
            events.append(self._event(index, {}, finish_reason=reason, **last))
        return b"".join(events)

    def _event(self, index: int, piece: Piece, **fields: Any) -> bytes:
        if fields or len(piece) > 1 or "content" not in piece or self._usage_everywhere:
            return self._written(index, piece, **fields)
        # Most events: between two of a choice only the text changes.
        if index not in self._around:
            self._around[index] = around_text(self._written(index, {"content": ""}))
        before, after = self._around[index]
        return before + to_json(piece["content"]) + after

    def _written(self, index: int, piece: Piece, **fields: Any) -> bytes:
        said = {"delta": piece} if self.head.is_chat else {"text": piece.get("content", "")}
        chunk = self.head.chunk([{"index": index, **said, "logprobs": None, "finish_reason": None, **fields}])
        return event({**chunk, "usage": self.usage} if self._usage_everywhere else chunk)

    def _logprobs(self, index: int, entries: Sequence[Any]) -> dict[str, Any]:
        if self.head.is_chat:
            return self._names.chat_logprobs(entries)
        shown, self._offsets[index] = self._names.text_logprobs(entries, self._offsets[index])
        return shown


class EventStream(Response):
    """Sends an answer's events while the client is there; when it goes away, its requests are cancelled."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, options: StreamOptions, outbox: Outbox, log: dict[str, Any]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._answer, self._options, self._outbox, self._log = answer, options, outbox, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            state = scope["state"]
            body = Body(state["send_on"], self._outbox, state.get("at_once", never))
            await unless_gone(receive, self._send_all(send, body))
        finally:
            self._answer.run.close()
            self._log.update(self._answer.log_fields)

    async def _send_all(self, send: Send, body: Body) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await self._answer.stream(self._options, body.write)
            await body.end()
        finally:
            body.close()


async def whole_response(answer: Answer, receive: Receive, log: dict[str, Any]) -> Any:
    """The object of `answer.whole()`, or None if the client went away before it was complete."""
    try:
        return await unless_gone(receive, answer.whole())
    finally:
        answer.run.close()
        log.update(answer.log_fields)
