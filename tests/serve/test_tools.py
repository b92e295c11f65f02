"""Calls in free text: found however the text is cut, and nothing is lost where there are none."""

from __future__ import annotations

import itertools
import json

from hypothesis import given
from hypothesis import strategies as st

from dspark.serve.tools import NamedVoice, RequiredVoice, TaggedVoice, merged

CALL = '<tool_call>{"name": "f", "arguments": {"x": "é"}}</tool_call>'


def heard(voice, pieces):
    return merged([piece for text in pieces for piece in voice.push(text)] + list(voice.finish()))


def cut(text, places):
    edges = [0, *sorted(min(p, len(text)) for p in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@given(st.lists(st.integers(0, 160), max_size=20))
def test_tagged_calls_are_found_however_the_text_is_cut(places):
    message = heard(TaggedVoice(), cut(f"Let me see. {CALL}\n{CALL}", places))
    assert message["content"] == "Let me see. \n"
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["f", "f"]
    assert json.loads(message["tool_calls"][1]["function"]["arguments"]) == {"x": "é"}
    assert len({call["id"] for call in message["tool_calls"]}) == 2


@given(st.text(alphabet="<tol_ca>/{}x ", max_size=60), st.lists(st.integers(0, 60), max_size=10))
def test_text_without_calls_stays_as_it_is(text, places):
    voice = TaggedVoice()
    message = heard(voice, cut(text, places))
    assert (message["content"] or "") == text
    assert not voice.has_called


def test_a_call_that_lost_its_closing_tag_or_its_sense():
    assert heard(TaggedVoice(), [CALL.removesuffix("</tool_call>")])["tool_calls"][0]["function"]["name"] == "f"
    broken = "<tool_call>{not json}</tool_call>"
    assert heard(TaggedVoice(), [broken]) == {"role": "assistant", "content": broken, "refusal": None}


def test_constrained_calls():
    message = heard(NamedVoice("g"), ['{"a"', ": 1}"])
    assert message["tool_calls"][0]["function"] == {"name": "g", "arguments": '{"a": 1}'}
    assert heard(NamedVoice("g"), [])["tool_calls"][0]["function"] == {"name": "g", "arguments": ""}
    message = heard(RequiredVoice(), ['{"name": "f", "argu', 'ments": {}}'])
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert heard(RequiredVoice(), ['{"name": "f", "argu'])["content"] == '{"name": "f", "argu'
