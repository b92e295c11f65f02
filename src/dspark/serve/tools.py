"""Function calling: what the model writes, told apart into text and calls while it comes."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

Piece = dict[str, Any]  # of an OpenAI delta: {"content": ...} or {"tool_calls": [...]}

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class Voice(Protocol):
    """Turns the text of one choice into deltas of its message."""

    has_called: bool

    def push(self, text: str) -> Iterable[Piece]: ...

    def finish(self) -> Iterable[Piece]:
        """No text follows."""
        ...


class PlainVoice:
    """All text is content."""

    has_called = False

    def push(self, text: str) -> Iterable[Piece]:
        return [{"content": text}] if text else ()

    def finish(self) -> Iterable[Piece]:
        return ()


class NamedVoice:
    """The output is constrained to the arguments of one function, so its text is those arguments."""

    has_called = True

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def push(self, text: str) -> Iterator[Piece]:
        if self._name is not None:
            yield _call(0, self._name, text)
            self._name = None
        elif text:
            yield {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}

    def finish(self) -> Iterator[Piece]:
        return self.push("")


class RequiredVoice:
    """The output is constrained to {"name": ..., "arguments": ...}: one call, known once it is complete."""

    has_called = True

    def __init__(self) -> None:
        self._text = ""

    def push(self, text: str) -> Iterator[Piece]:
        self._text += text
        return iter(())

    def finish(self) -> Iterator[Piece]:
        call = _parsed(self._text)
        if call is None:  # cut short by max_tokens
            self.has_called = False
            yield {"content": self._text}
        else:
            yield _call(0, *call)


class TaggedVoice:
    """Content, with calls in <tool_call>{"name": ..., "arguments": ...}</tool_call> as Hermes, Qwen and others write them."""

    def __init__(self) -> None:
        self.has_called, self._held, self._num_calls = False, "", 0

    def push(self, text: str) -> Iterator[Piece]:
        self._held += text
        while True:
            before, opened, rest = self._held.partition(_OPEN)
            if not opened:
                num_shown = len(self._held) - _num_begun(self._held)
                shown, self._held = self._held[:num_shown], self._held[num_shown:]
                yield from PlainVoice().push(shown)
                return
            yield from PlainVoice().push(before)
            inside, closed, after = rest.partition(_CLOSE)
            self._held = _OPEN + rest
            if not closed:
                return
            self._held = after
            yield self._piece(inside)

    def finish(self) -> Iterator[Piece]:
        inside = self._held.removeprefix(_OPEN)
        held, self._held = self._held, ""
        if held.startswith(_OPEN) and _parsed(inside) is not None:  # the end token came in place of the closing tag
            yield self._piece(inside)
        else:
            yield from PlainVoice().push(held)

    def _piece(self, inside: str) -> Piece:
        call = _parsed(inside)
        if call is None:  # not what it was announced to be: the client sees the text as it is
            return {"content": _OPEN + inside + _CLOSE}
        self.has_called, self._num_calls = True, self._num_calls + 1
        return _call(self._num_calls - 1, *call)


def _parsed(text: str) -> tuple[str, str] | None:
    """Name and arguments (as JSON) of a call, if the text is one."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    return call["name"], json.dumps(call.get("arguments", call.get("parameters", {})), ensure_ascii=False)


def _call(index: int, name: str, arguments: str) -> Piece:
    function = {"name": name, "arguments": arguments}
    return {
        "tool_calls": [
            {"index": index, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
        ]
    }


def _num_begun(text: str) -> int:
    """Characters at the end that may be the start of an opening tag."""
    return next((n for n in range(min(len(_OPEN) - 1, len(text)), 0, -1) if text.endswith(_OPEN[:n])), 0)


def merged(pieces: list[Piece]) -> dict[str, Any]:
    """The message that a choice's deltas add up to."""
    content, calls = "", list[dict[str, Any]]()
    for piece in pieces:
        content += piece.get("content", "")
        for part in piece.get("tool_calls", ()):
            if part["index"] == len(calls):
                calls.append(
                    {key: value for key, value in part.items() if key != "index"} | {"function": dict(part["function"])}
                )
            else:
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    message: dict[str, Any] = {
        "role": "assistant",
        "content": content if content or not calls else None,
        "refusal": None,
    }
    return message | ({"tool_calls": calls} if calls else {})
