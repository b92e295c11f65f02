"""Laws of text: streamed pieces are the whole, never change, and do not depend on how they were cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dspark.engine.engine import Engine
from dspark.engine.marks import DraftMarks
from dspark.engine.text import Detokenizer, StopStrings, render_prompt
from dspark.errors import InvalidRequest
from dspark.types import Delta, SamplingParams
from engine.models import random_target

TARGET = Path(__file__).parents[2] / "pairs" / "tiny" / "target"
TOKENIZER = AutoTokenizer.from_pretrained(TARGET)
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

texts = st.text(st.sampled_from("ab .\n0é漢字😀👩‍👩‍👧ཀ"), max_size=60)
sizes = st.lists(st.integers(1, 7), min_size=1, max_size=30)


def cut(items: Sequence[Any], lengths: list[int]) -> list[Any]:
    """Consecutive pieces of these lengths, over and over."""
    pieces, start, turn = [], 0, 0
    while start < len(items):
        pieces.append(items[start : start + lengths[turn % len(lengths)]])
        start, turn = start + len(pieces[-1]), turn + 1
    return pieces


def streamed(tokenizer: Any, token_ids: list[int], lengths: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [detokenizer.push(piece) for piece in cut(token_ids, lengths)] + [detokenizer.flush()]


def llama_like_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece's ways: spaces belong to the next word, the first is dropped, unknown characters are bytes."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for token in ["▁", "a", "b", ".", "0", "▁a", "▁b", "ab", "▁ab", "é"]:
        vocabulary[token] = len(vocabulary)
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


LLAMA_LIKE = llama_like_tokenizer()


# -- detokenizer ----------------------------------------------------------------------------------------------------


@given(st.lists(st.one_of(st.integers(0, 270), st.integers(0, len(TOKENIZER) - 1)), max_size=150), sizes)
def test_pieces_of_any_tokens_are_the_decoded_whole(token_ids: list[int], lengths: list[int]) -> None:
    assert "".join(streamed(TOKENIZER, token_ids, lengths)) == TOKENIZER.decode(token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, LLAMA_LIKE], ids=["byte-level", "byte-fallback"])
@given(text=texts, num_repeats=st.sampled_from([1, 6]), lengths=sizes)
@settings(max_examples=50)
def test_text_comes_whole_and_without_half_characters(
    tokenizer: Any, text: str, num_repeats: int, lengths: list[int]
) -> None:
    token_ids = tokenizer(text * num_repeats, verbose=False)["input_ids"]
    pieces = streamed(tokenizer, token_ids, lengths)
    assert "".join(pieces) == tokenizer.decode(token_ids)
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_a_character_waits_for_its_last_byte() -> None:
    token_ids = TOKENIZER("😀")["input_ids"]
    assert len(token_ids) > 1, "this test needs a character of several tokens"
    detokenizer = Detokenizer(TOKENIZER)
    assert [detokenizer.push([token_id]) for token_id in token_ids] == [""] * (len(token_ids) - 1) + ["😀"]
    assert detokenizer.flush() == ""


def test_a_character_that_never_ends_is_shown_at_the_end() -> None:
    detokenizer = Detokenizer(TOKENIZER)
    assert detokenizer.push(TOKENIZER("ok 😀")["input_ids"][:-1]) == "ok "
    assert detokenizer.flush() == REPLACEMENT
    assert detokenizer.flush() == ""


def test_context_keeps_the_space_between_prompt_and_continuation() -> None:
    prompt, continuation = LLAMA_LIKE("a b")["input_ids"], LLAMA_LIKE("ab")["input_ids"]
    assert Detokenizer(LLAMA_LIKE).push(continuation) == "ab"
    assert Detokenizer(LLAMA_LIKE, context=prompt).push(continuation) == " ab"


def test_a_raw_prompt_and_its_text_are_one_text(tmp_path: Path) -> None:
    """SentencePiece drops a text's first space, which is none of the first where a prompt comes before."""
    target = random_target(tmp_path, vocab_size=len(LLAMA_LIKE))
    target.tokenizer, engine = LLAMA_LIKE, Engine(target)
    word = LLAMA_LIKE("ab")["input_ids"]
    params = SamplingParams(temperature=0, max_tokens=2, logit_bias={word[0]: 100.0})
    for some in (params, replace(params, stop=("never",))):
        for prompt in ("a b", LLAMA_LIKE("a b")["input_ids"]):
            generation = engine.generate(prompt, some, raw=True)[0]
            assert (generation.token_ids, generation.text) == (word * 2, " ab ab")
        stream = engine.stream("a b", some, raw=True)
        assert "".join(delta.text for delta in stream) == " ab ab"
        marks = DraftMarks(LLAMA_LIKE, stream.request.context)
        assert list(marks.split(Delta(" ab ab", word * 2, [True, False]))) == [(" ab", True), (" ab", False)]
    assert engine.generate(LLAMA_LIKE("a b")["input_ids"], params)[0].text == "ab ab"  # a chat that its user rendered


@pytest.mark.parametrize(
    "token_ids",
    [
        TOKENIZER("Some text 😀. " * 200, verbose=False)["input_ids"],
        TOKENIZER.all_special_ids[:1] * 2000,
        TOKENIZER("😀")["input_ids"][-1:] * 2000,  # bytes that are no text
    ],
    ids=["text", "special tokens", "stray bytes"],
)
def test_cost_per_token_does_not_grow(token_ids: list[int]) -> None:
    class Counting:
        num_decoded = 0

        def decode(self, window: list[int], **options: Any) -> str:
            self.num_decoded += len(window)
            return str(TOKENIZER.decode(window, **options))

    tokenizer = Counting()
    assert "".join(streamed(tokenizer, token_ids, [1])) == TOKENIZER.decode(token_ids, skip_special_tokens=True)
    assert tokenizer.num_decoded < 70 * len(token_ids)


def test_a_token_is_decoded_once_where_tokens_are_just_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, token_ids = AutoTokenizer.from_pretrained(TARGET), TOKENIZER("a b a b a b 😀")["input_ids"]
    decoded: list[list[int]] = []

    class Backend:
        decoder = tokenizer.backend_tokenizer.decoder

        def decode(self, ids: list[int], **options: Any) -> str:
            decoded.append(ids)
            return str(TOKENIZER.backend_tokenizer.decode(ids, **options))

    monkeypatch.setattr(tokenizer, "_tokenizer", Backend())
    assert "".join(streamed(tokenizer, token_ids, [1])) == "a b a b a b 😀"
    decoded.clear()
    assert "".join(streamed(tokenizer, token_ids, [1])) == "a b a b a b 😀"  # another text in the same tokens
    assert decoded and all(REPLACEMENT in TOKENIZER.decode(ids[:1]) for ids in decoded)  # the parts of 😀


def test_what_a_template_shows_must_be_text(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    tokenizer.chat_template = "{{ messages[0].name }}{{ tools[0].name if tools }}"
    said = {"role": "user", "content": "a"}
    for messages, tools in (([{**said, "name": "\ud800"}], []), ([said], [{"name": "\ud800"}])):
        with pytest.raises(InvalidRequest, match="not valid text"):
            render_prompt(tokenizer, messages, tools=tools)


# -- stop strings ---------------------------------------------------------------------------------------------------

stop_lists = st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3)


def stopped(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    """The definition: read character by character until the text ends in a stop string; the longest of those."""
    for end in range(len(text) + 1):
        if ended := [s for s in stop if text[:end].endswith(s)]:
            longest = max(ended, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(st.text("ab ", max_size=40), stop_lists, sizes)
@example("aabba", ["ab", "aabb"], [5])  # the one that begins first is complete last
@example("ab", ["ab", "b"], [1])  # both are complete at once
def test_stop_strings_do_not_depend_on_how_text_is_cut(text: str, stop: list[str], lengths: list[int]) -> None:
    stop_strings = StopStrings(stop)
    shown = "".join(stop_strings.push(piece) for piece in cut(text, lengths)) + stop_strings.flush()
    assert (shown, stop_strings.found) == stopped(text, stop)


@given(st.text("ab ", max_size=40), stop_lists)
def test_no_more_is_held_back_than_may_become_a_stop_string(text: str, stop: list[str]) -> None:
    stop_strings = StopStrings(stop)
    shown = stop_strings.push(text)
    held = text[len(shown) :]
    assert stop_strings.found or not held or any(s.startswith(held) for s in stop)


def test_a_stop_string_across_tokens_of_half_characters() -> None:
    detokenizer, stop_strings = Detokenizer(TOKENIZER), StopStrings(["b😀c", "never"])
    token_ids = TOKENIZER("a b😀 b😀c d")["input_ids"]
    shown = [stop_strings.push(detokenizer.push([token_id])) for token_id in token_ids]
    assert "".join(shown) == "a b😀 "
    assert stop_strings.found == "b😀c"
    assert stop_strings.push("more") == stop_strings.flush() == ""


# -- prompts --------------------------------------------------------------------------------------------------------


def test_a_string_is_one_user_turn() -> None:
    messages = [{"role": "user", "content": "Hello"}]
    expected = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert render_prompt(TOKENIZER, "Hello") == render_prompt(TOKENIZER, messages) == expected
    assert all(isinstance(token_id, int) for token_id in expected)


def test_raw_text_and_token_ids_are_taken_as_they_are() -> None:
    assert render_prompt(TOKENIZER, "Hello", raw=True) == TOKENIZER("Hello")["input_ids"]
    assert render_prompt(TOKENIZER, [5, 6, 7]) == [5, 6, 7]
    assert render_prompt(None, [5, 6, 7], raw=True) == [5, 6, 7]


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "raw", "message"),
    [
        (TOKENIZER, "", False, "empty"),
        (TOKENIZER, "", True, "empty"),
        (TOKENIZER, [], False, "empty"),
        (TOKENIZER, [5, -1], False, "-1"),
        (TOKENIZER, [5, True], False, "True"),
        (TOKENIZER, [{"role": "user", "content": "Hello"}, 5], False, "all messages or all token ids"),
        (TOKENIZER, [{"content": "Hello"}], False, "'role'"),
        (TOKENIZER, [{"role": "user", "content": "Hello"}], True, "leave raw out"),
        (TOKENIZER, "half a \ud83d pair", False, "character 7"),
        (TOKENIZER, 7, False, "int"),
        (LLAMA_LIKE, "a b", False, "--raw"),
        (None, "a b", False, "no tokenizer"),
        (None, "a b", True, "no tokenizer"),
    ],
)
def test_a_prompt_that_cannot_be_served_says_why(tokenizer: Any, prompt: Any, raw: bool, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        render_prompt(tokenizer, prompt, raw=raw)


@pytest.mark.parametrize("code", ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}"])
def test_templates_run_in_a_sandbox(code: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    tokenizer.chat_template = code
    with pytest.raises(InvalidRequest, match="refuses these messages"):
        render_prompt(tokenizer, "Hi")


def test_what_a_template_refuses_is_a_mistake_of_the_request() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    tokenizer.chat_template = "{{ raise_exception('no system role here') }}"
    with pytest.raises(InvalidRequest, match="no system role here"):
        render_prompt(tokenizer, [{"role": "system", "content": "Be kind"}])
