"""Records as the target reads them: its own chat template, and an exact mask of what the assistant wrote.

The mask comes from the template's own markers where it has them, otherwise from character offsets in the rendered text.
A prefix is never tokenised by itself: the same characters may be other tokens there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from transformers import AutoConfig, AutoTokenizer

from dspark.errors import CheckpointError, InvalidConfiguration
from dspark.target.loading import resolve
from dspark.train.records import Record
from dspark.train.texts import Text

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Unusable:
    """Why a record teaches nothing: no assistant turn, an answer the template drops, ..."""

    reason: str


class Renderer:
    """Turns records into texts with a loss mask.

    system  put before conversations that have no system message; None: nothing is put there
    """

    def __init__(self, tokenizer: Any, system: str | None = None) -> None:
        self.tokenizer, self.system = tokenizer, system
        template = getattr(tokenizer, "chat_template", None)
        self.has_markers = isinstance(template, str) and "{% generation" in template.replace("{%-", "{%")
        if not getattr(tokenizer, "is_fast", False):
            raise InvalidConfiguration(
                "masks come from character offsets, which only fast tokenizers give; this one is "
                f"{type(tokenizer).__name__}: convert it to tokenizer.json"
            )

    def with_system(self, messages: Messages) -> list[dict[str, str]]:
        """The conversation as it is rendered."""
        own = [dict(message) for message in messages]
        if self.system is None or own[0]["role"] == "system":
            return own
        return [{"role": "system", "content": self.system}, *own]

    def render(self, record: Record) -> Text | Unusable:
        """Token ids and mask of a record; plain text is learned from all through."""
        if record.text is not None:
            return self._plain(record.text)
        messages = self.with_system(record.messages)
        if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
            return Unusable("no assistant turn; `dspark data regenerate` has the target answer")
        self._require_template()
        try:
            return self._by_markers(messages) if self.has_markers else self._by_offsets(messages)
        except TemplateError as error:
            return Unusable(f"the chat template refuses it: {error}")

    def _plain(self, text: str) -> Text | Unusable:
        token_ids = self.tokenizer(text, verbose=False)["input_ids"]
        if not token_ids:
            return Unusable("nothing left once tokenised")
        loss_mask = torch.ones(len(token_ids), dtype=torch.bool)
        loss_mask[0] = False  # nothing comes before it
        return Text(torch.tensor(token_ids, dtype=torch.int32), loss_mask)

    def _by_markers(self, messages: list[dict[str, str]]) -> Text | Unusable:
        rendered = self.tokenizer.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
        return _text(rendered["input_ids"], [bool(m) for m in rendered["assistant_masks"]])

    def _by_offsets(self, messages: list[dict[str, str]]) -> Text | Unusable:
        whole = self._characters(messages)
        answers = self._answers(messages, whole)
        if not answers:
            return Unusable("the chat template leaves every answer out or rewrites it")
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        token_ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        closing = self.tokenizer.added_tokens_decoder  # end-of-turn tokens are among these
        mask = [False] * len(token_ids)
        for begin, end in answers:
            for i, (first, _) in enumerate(offsets):
                if begin <= first < end:
                    mask[i] = True
                elif first == end and i > 0 and mask[i - 1] and token_ids[i] in closing:
                    mask[i] = True  # what ends the answer is the assistant's too
        return _text(token_ids, mask)

    def _answers(self, messages: list[dict[str, str]], whole: str) -> list[tuple[int, int]]:
        """Where in the rendered text each answer stands, what the template puts before its content included."""
        found, cursor = [], 0
        for index, message in enumerate(messages):
            content = message["content"].strip()
            if message["role"] == "assistant" and content:
                # Nobody asks for an answer that comes first: what stands before it is the template's.
                asked = self._characters(messages[:index], add_generation_prompt=True) if index else None
                is_start = asked is not None and whole.startswith(asked) and len(asked) >= cursor
                opening = len(asked) if asked is not None and is_start else None
                begin = whole.find(content, cursor if opening is None else opening)
                if begin < 0 and "</think>" in content:  # templates drop the thoughts of earlier turns
                    content = content.rpartition("</think>")[2].strip()
                    begin = whole.find(content, cursor if opening is None else opening) if content else -1
                if begin < 0:
                    continue
                cursor = begin + len(content)
                blank = message["content"][len(message["content"].rstrip()) :]
                cursor += len(blank) if whole.startswith(blank, cursor) else 0  # some templates strip, some do not
                found.append((begin if opening is None else opening, cursor))
            elif (place := whole.find(content, cursor)) >= 0:
                cursor = place + len(content)
        return found

    def _characters(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        text: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return text

    def _require_template(self) -> None:
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise InvalidConfiguration(
                "this target's tokenizer has no chat template, so conversations cannot be rendered: give it one "
                '(tokenizer.chat_template), or plain {"text"} records'
            )


def _text(token_ids: Sequence[int], mask: Sequence[bool]) -> Text | Unusable:
    if not any(mask):
        return Unusable("no token of it is the assistant's")
    return Text(torch.tensor(token_ids, dtype=torch.int32), torch.tensor(mask))


def load_tokenizer(target: str) -> tuple[Any, int]:
    """(tokenizer, vocabulary size of the model) of `tiny`, a folder or a hub id, without its weights."""
    source = resolve(target)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        config = AutoConfig.from_pretrained(source).get_text_config(decoder=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"the tokenizer or config.json of {target} could not be read ({type(error).__name__}: {error}); "
            "name a target that has both"
        ) from error
    return tokenizer, int(config.vocab_size)
