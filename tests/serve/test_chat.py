"""The API through OpenAI's own client: the engine's answers, whole and streamed."""

from __future__ import annotations

import httpx
import openai
import pytest

from dspark import Engine
from dspark.serve.replies import TokenNames
from serve.conftest import serving

PROMPT = "What drinks do you have?"
MESSAGES = [{"role": "user", "content": PROMPT}]


def chat(served, **body):
    return served.client.chat.completions.create(model="tiny", **{"messages": MESSAGES, **body})


def text_of(chunks):
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


@pytest.mark.parametrize("settings", [dict(temperature=0), dict(temperature=1, seed=7), dict(seed=3, top_p=0.9)])
def test_the_text_is_plain_decodings(served, plain, settings):
    expected = plain(PROMPT, max_tokens=40, **settings)
    answer = chat(served, max_tokens=40, **settings)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert (answer.object, answer.model) == ("chat.completion", "tiny")

    chunks = list(
        chat(served, max_completion_tokens=40, stream=True, stream_options={"include_usage": True}, **settings)
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert text_of(chunks) == expected.text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == expected.finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage == answer.usage
    assert len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in chunks[:-1])


def test_the_raw_stream_is_server_sent_events(served):
    body = {"model": "tiny", "messages": MESSAGES, "stream": True, "max_tokens": 5}
    reply = httpx.post(served.url + "/v1/chat/completions", json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])


def test_tokens_so_far_in_every_chunk_when_asked(served):
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [
        c.usage.completion_tokens for c in chat(served, seed=1, max_tokens=9, stream=True, stream_options=options)
    ]
    assert counts == sorted(counts) and counts[-1] == chat(served, seed=1, max_tokens=9).usage.completion_tokens > 0


def test_n_choices_are_distinct_and_repeatable(served, plain):
    first, second = (chat(served, n=3, seed=11, max_tokens=12) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert len(set(texts)) == 3
    assert texts[0] == plain(PROMPT, seed=11, max_tokens=12).text
    assert first.usage.prompt_tokens == chat(served, max_tokens=1).usage.prompt_tokens
    streamed = ["", "", ""]
    for chunk in chat(served, n=3, seed=11, max_tokens=12, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_stop_strings_end_the_text(served, plain):
    whole = plain(PROMPT, temperature=0, max_tokens=60).text
    word = whole[len(whole) // 3 :].split()[1]
    answer = chat(served, temperature=0, max_tokens=60, stop=[word])
    assert answer.choices[0].message.content == whole[: whole.index(word)]
    assert answer.choices[0].finish_reason == "stop"
    assert text_of(chat(served, temperature=0, max_tokens=60, stop=word, stream=True)) == whole[: whole.index(word)]


def test_logprobs_are_the_targets_own(served, plain):
    expected = plain(PROMPT, temperature=0, max_tokens=10, logprobs=3)
    answer = chat(served, temperature=0, max_tokens=10, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert [e.logprob for e in content] == pytest.approx([e.logprob for e in expected.logprobs], abs=1e-4)
    assert [len(e.top_logprobs) for e in content] == [3] * 10
    assert bytes(b for e in content for b in e.bytes).decode() == expected.text
    assert all(e.top_logprobs[0].token == e.token for e in content)  # greedy

    chunks = list(chat(served, temperature=0, max_tokens=10, logprobs=True, top_logprobs=3, stream=True))
    streamed = [e for c in chunks if c.choices and c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert [e.token for e in streamed] == [e.token for e in content]


def test_bytes_of_tokens_that_are_no_characters(served):
    answer = chat(served, temperature=0, max_tokens=1, logprobs=True, messages=[{"role": "user", "content": "é"}])
    (entry,) = answer.choices[0].logprobs.content
    assert entry.bytes
    names = TokenNames(served.engine.target.tokenizer)
    euro = served.engine.target.tokenizer("𝄞")["input_ids"]
    assert bytes(b for t in euro for b in names.bytes(t)).decode() == "𝄞"


def test_penalties_bias_and_extras_reach_the_engine(served, plain):
    settings = dict(temperature=0.8, seed=5, max_tokens=16, presence_penalty=0.5, frequency_penalty=0.3)
    extras = dict(top_k=20, min_p=0.02, repetition_penalty=1.2, ignore_eos=True)
    expected = plain(PROMPT, logit_bias={260: 3.0}, **settings, **extras)
    answer = chat(served, logit_bias={"260": 3.0}, **settings, extra_body=extras)
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.completion_tokens == 16


def test_top_p_of_nothing_leaves_the_likeliest(served):
    said = [chat(served, max_tokens=12, **law).choices[0].message.content for law in ({"top_p": 0}, {"temperature": 0})]
    assert said[0] == said[1]


def test_null_is_left_out_and_hints_change_nothing(served):
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "seed": 2}
    hints = {"n": None, "stream": None, "stop": None, "logprobs": None, "ignore_eos": None, "tools": None}
    hints |= {"modalities": ["text"], "prediction": {"type": "content", "content": "A river"}}
    replies = [httpx.post(served.url + "/v1/chat/completions", json={**body, **more}).json() for more in ({}, hints)]
    assert replies[0]["choices"] == replies[1]["choices"]


def test_characters_of_several_tokens_come_whole(served):
    text = "naïve 日本語 🎉 👩‍👩‍👧 𝄞"
    exactly = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": text}}}
    for stop, expected in ((None, f'"{text}"'), ("語 🎉", '"naïve 日本')):
        chunks = chat(served, response_format=exactly, max_tokens=120, stop=stop, stream=True, logprobs=True)
        pieces = [c.choices[0].delta.content or "" for c in chunks]
        assert "".join(pieces) == expected
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_stop_string_is_found_wherever_pieces_end(served):
    whole = chat(served, temperature=0, max_tokens=40).choices[0].message.content
    for start in range(0, len(whole) - 9, 11):
        stop = whole[start : start + 9]
        chunks = chat(served, temperature=0, max_tokens=40, stop=stop, stream=True)
        assert text_of(chunks) == whole[: whole.index(stop)]


def test_templates_are_told_whether_to_think(target, monkeypatch):
    template = "{{ messages[-1].content }}{% if enable_thinking %}<think>{% endif %}{{ reasoning_effort or '' }}"
    monkeypatch.setattr(target.tokenizer, "chat_template", template)
    with serving(Engine(target)) as served:
        for asked, rendered in (
            ({}, PROMPT),
            ({"chat_template_kwargs": {"enable_thinking": True}}, PROMPT + "<think>"),
            ({"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "high"}, PROMPT + "high"),
        ):
            usage = chat(served, max_tokens=1, extra_body=asked).usage
            assert usage.prompt_tokens == len(target.tokenizer(rendered)["input_ids"])
        for name in ("tokenize", "messages", "chat_template"):  # of ours, or of the library
            with pytest.raises(openai.BadRequestError, match=f"chat_template_kwargs.{name}"):
                chat(served, extra_body={"chat_template_kwargs": {name: "x"}})


def test_content_parts_and_the_older_roles(served, plain):
    expected = plain([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi there"}], seed=1)
    messages = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there", "cache_control": {}}],
        },
    ]
    assert chat(served, messages=messages, seed=1, max_tokens=256).choices[0].message.content == expected.text


def test_completions_continue_texts_and_token_ids(served, plain):
    client = served.client
    expected = plain("The river", raw=True, temperature=0, max_tokens=16)
    answer = client.completions.create(model="tiny", prompt="The river", temperature=0)
    assert answer.choices[0].text == expected.text
    assert answer.usage.completion_tokens == 16  # OpenAI's default
    ids = expected.prompt_token_ids
    both = client.completions.create(model="tiny", prompt=[ids, ids], temperature=0, n=2, max_tokens=16)
    assert [c.text for c in both.choices] == [expected.text] * 4
    assert [c.index for c in both.choices] == [0, 1, 2, 3]
    assert both.usage.prompt_tokens == 2 * len(ids)
    stream = client.completions.create(model="tiny", prompt="The river", temperature=0, stream=True, logprobs=2)
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks) == expected.text
    offsets = [o for c in chunks if c.choices[0].logprobs for o in c.choices[0].logprobs.text_offset]
    assert offsets == sorted(offsets)
    assert len(offsets) == 16


def test_speculation_is_reported_where_asked(served):
    extras = {"dspark": True, "ignore_eos": True, "seed": 1}
    answer = chat(served, temperature=0, max_tokens=48, extra_body=extras)
    stats = answer.choices[0].dspark
    assert stats["accepted"] + stats["target_passes"] + 1 == answer.usage.completion_tokens
    assert stats["accepted"] == sum(stats["accepted_per_position"]) > 0
    assert stats["tau"] == pytest.approx(1 + stats["accepted"] / stats["target_passes"], abs=1e-3)
    details = answer.usage.completion_tokens_details
    assert details is None or details.accepted_prediction_tokens is None

    chunks = list(chat(served, temperature=0, max_tokens=48, stream=True, extra_body=extras))
    reports = [c.choices[0].dspark for c in chunks if c.choices and getattr(c.choices[0], "dspark", None)]
    marks = [mark for report in reports for mark in report.get("marks", [])]
    assert "".join(text for text, _ in marks) == text_of(chunks) == answer.choices[0].message.content
    assert {is_drafted for _, is_drafted in marks} == {True, False}
    assert reports[-1] == stats
    assert not hasattr(chat(served, max_tokens=2).choices[0], "dspark")


def test_models_and_tokens(served):
    assert [m.id for m in served.client.models.list()] == ["tiny"]
    assert served.client.models.retrieve("tiny").max_model_len == served.engine.max_length
    tokens = httpx.post(served.url + "/tokenize", json={"prompt": "A river é"}).json()
    assert tokens["count"] == len(tokens["tokens"])
    assert httpx.post(served.url + "/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": "A river é"}
    chat_tokens = httpx.post(served.url + "/tokenize", json={"messages": MESSAGES}).json()["tokens"]
    assert len(chat_tokens) == chat(served, max_tokens=1).usage.prompt_tokens
    assert httpx.get(served.url + "/version").json()["version"]
    assert httpx.get(served.url + "/health").status_code == httpx.get(served.url + "/ready").status_code == 200
