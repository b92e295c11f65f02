"""Between text and token ids: the chat template, incremental detokenisation, stop strings.

What a user sees must not depend on how many tokens a step commits. So both streams below give the same text however
their input is cut: `Detokenizer` for tokens that hold part of a character, `StopStrings` for a match across pieces.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import Any, cast
from weakref import WeakKeyDictionary

from jinja2.exceptions import TemplateError
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from dspark.errors import InvalidRequest

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has at most 4 bytes. Before the fourth has come, decoders show 1 mark (byte-level) or one for each byte of
# the whole run of byte tokens, finished characters among them included (byte fallback).
_MAX_UNFINISHED = 3
_MAX_WINDOW = 16  # tokens decoded again each time
_MAX_UNFINISHED_WINDOW = 64
_TEXTS_OF_TOKENS: WeakKeyDictionary[Any, _Texts] = WeakKeyDictionary()


def render_prompt(
    tokenizer: Any,
    prompt: Prompt,
    raw: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids the target reads for a prompt.

    A string is one user turn in the chat template, or with `raw` text to be continued as it stands. A list of
    {"role", "content"} messages goes through the template, `tools` (JSON schemas of functions) and `variables` that it may
    ask for (`enable_thinking`) with it; a list, array or tensor of token ids is taken as it is.
    """
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if isinstance(prompt, str):
        if not prompt:
            raise InvalidRequest("the prompt is empty: give at least one character")
        if raw:
            _require_tokenizer(tokenizer)
            # verbose=False: the engine says itself, and as an error, when a prompt is too long
            return _not_empty(list(tokenizer(_valid_text(prompt), verbose=False)["input_ids"]))
        return _render_chat(tokenizer, [{"role": "user", "content": _valid_text(prompt)}], tools, variables)
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise InvalidRequest(f"a prompt is a string, messages or token ids, not {type(prompt).__name__}")
    if not prompt:
        raise InvalidRequest("the prompt is empty: give at least one message or token id")
    if all(isinstance(item, Mapping) for item in prompt):
        if raw:
            raise InvalidRequest("raw is for strings and token ids; messages need the chat template: leave raw out")
        return _render_chat(tokenizer, prompt, tools, variables)  # type: ignore[arg-type]  # every item is a Mapping
    for item in prompt:
        if not isinstance(item, Integral) or isinstance(item, bool) or item < 0:
            raise InvalidRequest(f"a prompt in a list is all messages or all token ids, 0 or more; got {item!r} in it")
    return [int(item) for item in prompt]  # type: ignore[arg-type]  # every item is an integer


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A string, one conversation and one list of token ids are each a single prompt."""
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise InvalidRequest(f"prompts are a string, messages, token ids, or a list of these; got {prompts!r:.80}")
    if not isinstance(prompts, Sequence):  # a generator, an array
        prompts = prompts.tolist() if hasattr(prompts, "tolist") else list(prompts)
    is_single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], (Integral, Mapping)))
    return [cast(Prompt, prompts)] if is_single else list(cast(Sequence[Prompt], prompts))


def _render_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any] | None,
) -> list[int]:
    _require_tokenizer(tokenizer)
    if not has_chat_template(tokenizer):
        raise InvalidRequest(
            "this tokenizer has no chat template, so a prompt cannot be put as a chat turn: use raw=True (--raw on the "
            "command line) to continue the text as it stands, or set tokenizer.chat_template"
        )
    for message in messages:
        if not isinstance(message.get("role"), str):
            raise InvalidRequest(f"a chat message needs a 'role' such as 'user' and a 'content'; got {dict(message)!r}")
        if isinstance(content := message.get("content"), str):
            _valid_text(content)
    try:
        rendered = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=list(tools) or None,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            tokenizer_kwargs={"verbose": False},
            **(variables or {}),
        )
    except TemplateError as error:
        raise InvalidRequest(f"the chat template of this tokenizer refuses these messages: {error}") from error
    except TypeError:  # which is all that tokenizers say where names, calls or tools are no text
        _valid_text(json.dumps([list(messages), list(tools)], ensure_ascii=False, default=str))
        raise
    return _not_empty(list(rendered["input_ids"]))


def has_chat_template(tokenizer: Any) -> bool:
    """Whether prompts can be put as chat turns; base models have none and are given raw ones."""
    return getattr(tokenizer, "chat_template", None) is not None


def _require_tokenizer(tokenizer: Any) -> None:
    if tokenizer is None:
        raise InvalidRequest(
            "this target has no tokenizer, so a prompt must be a list of token ids: put its tokenizer.json beside the "
            "weights, or give token ids from Python"
        )


def _valid_text(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"the prompt is not valid text at character {error.start}: pass it as UTF-8") from error
    return text


def _not_empty(token_ids: list[int]) -> list[int]:
    if not token_ids:
        raise InvalidRequest("the prompt is empty once tokenised: give text that this tokenizer does not drop")
    return token_ids


class Detokenizer:
    """Text of one growing token sequence, special tokens left out, in pieces that never change later.

    The pieces and `flush()` together are `tokenizer.decode` of all ids. What a token says can depend on its
    predecessors (unfinished characters, SentencePiece's leading space), so a short window is decoded again each time,
    from a point where text and tokens were in step: constant cost per token. Where tokens are just bytes, the text of
    each is looked up, and only those that hold part of a character are decoded together. `context`: tokens before the
    first one, for text that continues a raw prompt.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        self._decode, self._texts = _decoder(tokenizer), _texts_of_tokens(tokenizer)
        self._window = list(context)
        text = self._decode(self._window) if self._window else ""
        self._num_emitted = len(text)  # characters of decode(window) that have been handed out
        self._restart = self._in_step = 0  # window lengths with no character open: the last but one, and the last

    def push(self, token_ids: Iterable[int]) -> str:
        """What these tokens add for certain; an unfinished character waits for the next push."""
        new = list(token_ids)
        if not new:
            return ""
        if self._texts is not None and not self._window:  # as most are
            text = "".join(map(self._texts.__getitem__, new))
            if _REPLACEMENT not in text:
                return text
        text = self._decode([*self._window, *new])
        if len(new) > 1 and text.endswith(_REPLACEMENT):
            # One by one: a long run of bytes has to be seen at the moments when no character is open.
            return "".join(self.push([token_id]) for token_id in new)
        self._window += new
        num_certain = len(text.rstrip(_REPLACEMENT))
        if num_certain < len(text) and len(self._window) >= _MAX_UNFINISHED_WINDOW:
            num_certain = len(text) - _MAX_UNFINISHED  # bytes without end that are no text
        piece = text[self._num_emitted : num_certain]
        self._num_emitted = max(self._num_emitted, num_certain)
        if num_certain == len(text):
            if self._texts is not None:  # what follows does not depend on this
                self._window, self._num_emitted, self._restart, self._in_step = [], 0, 0, 0
            elif not piece and len(self._window) > _MAX_WINDOW:
                del self._window[-len(new) :]  # special tokens without end: they add nothing, but time
            elif piece:
                self._restart, self._in_step = self._in_step, len(self._window)
                if len(self._window) > _MAX_WINDOW:
                    self._cut(self._restart, num_held=0)
        elif len(self._window) >= _MAX_UNFINISHED_WINDOW:
            self._cut(len(self._window) - _MAX_WINDOW, num_held=len(text) - num_certain)
        return piece

    def flush(self) -> str:
        """The rest at the end of the sequence: a character that never got its last byte is U+FFFD."""
        text = self._decode(self._window) if self._window else ""
        rest = text[self._num_emitted :]
        self._num_emitted = max(self._num_emitted, len(text))
        return rest

    def _cut(self, start: int, num_held: int) -> None:
        """Drop the window's first tokens; the last `num_held` characters of its text have not been handed out."""
        del self._window[:start]
        self._restart, self._in_step = 0, max(0, self._in_step - start)
        self._num_emitted = len(self._decode(self._window)) - num_held


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """Token ids to text, special tokens left out. Without cleaning up spaces: that looks ahead, and shown text would change."""
    if _decodes_as_usual(tokenizer):
        # What its two methods then do, and they take longer to find out that there is nothing else to do.
        return partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=True)
    return partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class _Texts(dict[int, str]):
    """The text of single tokens, kept once it has been looked up."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode

    def __missing__(self, token_id: int) -> str:
        text = self[token_id] = self._decode([token_id])
        return text


def _texts_of_tokens(tokenizer: Any) -> _Texts | None:
    """None: the text of a token can depend on other tokens."""
    if not _decodes_as_usual(tokenizer) or not isinstance(tokenizer.backend_tokenizer.decoder, ByteLevel):
        return None
    if (texts := _TEXTS_OF_TOKENS.get(tokenizer)) is None:
        texts = _TEXTS_OF_TOKENS[tokenizer] = _Texts(_decoder(tokenizer))
    return texts


def _decodes_as_usual(tokenizer: Any) -> bool:
    kind = type(tokenizer)
    return bool(kind.decode is PreTrainedTokenizerFast.decode and kind._decode is PreTrainedTokenizerFast._decode)


class StopStrings:
    """Finds the first stop string in streamed text and cuts the text before it.

    First is the one complete first, as if text came character by character: then how text is cut into pieces does not
    matter. Text that may turn out to be the start of a stop string is held back.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found: str | None = None  # the stop string that ended the text

    def push(self, text: str) -> str:
        """Text that may be shown. Once a stop string has been found, nothing more comes."""
        if self.found is not None:
            return ""
        if not self._stop:
            return text
        self._held += text
        matches = [(start + len(stop), start, stop) for stop in self._stop if (start := self._held.find(stop)) >= 0]
        if matches:
            _, start, self.found = min(matches)
            shown, self._held = self._held[:start], ""
            return shown
        num_shown = len(self._held) - max(self._num_begun(stop) for stop in self._stop)
        shown, self._held = self._held[:num_shown], self._held[num_shown:]
        return shown

    def flush(self) -> str:
        """What was held back, now that the text has ended and no stop string can follow."""
        rest, self._held = self._held, ""
        return rest

    def _num_begun(self, stop: str) -> int:
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
