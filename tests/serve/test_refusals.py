"""What the server does not take: each refusal in OpenAI's shape, naming the field, and the next request served."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from contextlib import suppress

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark import Engine, SamplingParams
from dspark.serve.faults import ApiError
from dspark.serve.nesting import MOST_LEVELS, check_nesting
from serve.conftest import serving

MESSAGES = [{"role": "user", "content": "What is a river?"}]
NESTED_CALL = {"function": {"name": "f", "arguments": "[" * 100_000}}
CHAT = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4}


def post(served, body, path="/v1/chat/completions", **options):
    return httpx.post(served.url + path, json=body, timeout=60, **options)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"repetition_penalty": 1e-9}, "repetition_penalty"),
        ({"n": 0}, "n"),
        ({"n": 33}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [""]}, "stop.0"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": "x " * 9000}]}, "messages"),
        ({"max_tokens": 2, "min_tokens": 3}, "min_tokens"),
        ({"frobnicate": 1}, "frobnicate"),
        ({"Model": 1}, "Model"),
        ({"best_of": 1}, "best_of"),
        ({"tool_choice": {"type": "custom"}}, "tool_choice.type"),
        ({"": 1}, ""),
        ({"seed": 2**64}, "seed"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "frob"}}}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": False}}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 129}, "tools"),
        ({"messages": [{"role": "assistant", "tool_calls": [NESTED_CALL]}]}, ""),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_bad_fields_are_named(served, change, field):
    reply = post(served, {**CHAT, **change})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert (error["param"] or "") == field


@pytest.mark.parametrize(("levels", "is_taken"), [(96, True), (97, False), (800, False), (40_000, False)])
def test_a_body_is_not_nested_without_end(served, levels, is_taken):
    """By a bound of the server's own, wherever Python's is: Hypothesis raises it, and parsers look at others."""
    tool = {"type": "function", "function": {"name": "f", "parameters": "HERE"}}  # three levels, and the body's own
    deep = '{"items":' * (levels - 1) + "{}" + "}" * (levels - 1)
    body = json.dumps({**CHAT, "tools": [tool]}).replace('"HERE"', deep)
    headers = {"content-type": "application/json"}
    reply = httpx.post(served.url + "/v1/chat/completions", content=body, headers=headers, timeout=60)
    if is_taken:
        assert reply.status_code == 200, reply.text
        return
    assert reply.status_code == 400, reply.text
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert "nested more than 100 levels deep" in reply.json()["error"]["message"]


values = st.recursive(
    st.text('a[]{}"\\\n', max_size=6) | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('[{"\\', max_size=3), inner, max_size=3),
)


def levels_of(value) -> int:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inside is None else 1 + max(map(levels_of, inside), default=0)


@given(values, st.integers(90, 110))
def test_levels_are_counted_past_whatever_strings_hold(value, num_around):
    text = '[[], "[[", ' * num_around + json.dumps(value, indent=1) + "]" * num_around
    try:
        check_nesting(text.encode(), "it")
        is_taken = True
    except ApiError:
        is_taken = False
    assert is_taken == (num_around + max(levels_of(value), 1) <= MOST_LEVELS)


@pytest.mark.parametrize("piece", [b'"', b'\\"', b"[]", b'{"a":[', b"\\"])
def test_counting_levels_takes_no_longer_than_the_body_is(piece):
    began = time.thread_time()
    with suppress(ApiError):
        check_nesting(b"[" * 200 + b'"' + piece * (2**20 // len(piece)), "it")
    assert time.thread_time() - began < 1


def test_errors_that_clients_know_how_to_mend(served):
    assert post(served, {**CHAT, "messages": [{"role": "user", "content": "x " * 9000}]}).json()["error"]["code"] == (
        "context_length_exceeded"
    )
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.com/x.png"}}]}
    message = post(served, {**CHAT, "messages": [image]}).json()["error"]["message"]
    assert message == "messages.0.content.0.type: only 'text' is supported here"
    as_curl_does = httpx.post(served.url + "/v1/chat/completions", content=json.dumps(CHAT))
    assert as_curl_does.status_code == 400
    assert "Content-Type: application/json" in as_curl_does.json()["error"]["message"]


def test_the_client_raises_its_own_errors(served):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        served.client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=-1)
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-9'"):
        served.client.chat.completions.create(model="gpt-9", messages=MESSAGES)


def test_what_is_no_json_or_no_route(served):
    headers = {"content-type": "application/json"}
    for content in (b"", b"{", b"[" * 100_000, b'{"messages": NaN}', b"\xff\xfe", b'"text"', b"null"):
        reply = httpx.post(served.url + "/v1/chat/completions", content=content, headers=headers)
        assert reply.status_code == 400, content
        assert reply.json()["error"]["message"]
    for content, words in ((b"", "must be a JSON object"), (b"[]", "must be a JSON object"), (b'"\xff"', "in UTF-8")):
        reply = httpx.post(served.url + "/v1/chat/completions", content=content, headers=headers)
        assert words in reply.json()["error"]["message"], content
    surrogate = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    assert httpx.post(served.url + "/v1/chat/completions", content=surrogate, headers=headers).status_code == 400
    nowhere = httpx.post(served.url + "/chat/completions", json=CHAT).json()["error"]  # a base_url without /v1
    assert nowhere["type"] == "not_found_error" and "/v1" in nowhere["message"]
    head = httpx.head(served.url + "/health")
    assert (head.status_code, head.text, head.headers["content-length"]) == (200, "", "15")
    assert httpx.get(served.url + "/v1/chat/completions").status_code == 405


def test_oversized_bodies_are_refused_before_they_are_read(target):
    with serving(Engine(target), max_body_bytes=1000) as served:
        assert post(served, {**CHAT, "user": "x" * 1000}).status_code == 413

        def endless():
            for _ in range(100):
                yield b"x" * 100

        reply = httpx.post(served.url + "/v1/chat/completions", content=endless())
        assert reply.status_code == 413
        assert reply.json()["error"]["code"] == "body_too_large"
        host, port = served.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
            assert b" 413 " in raw.recv(100)
        assert post(served, CHAT).status_code == 200


def test_a_body_that_never_comes_is_given_up(target):
    with serving(Engine(target), body_seconds=0.2) as served:
        host, port = served.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            raw.settimeout(30)
            assert b" 408 " in raw.recv(100)


def test_what_is_no_http_and_heads_without_end_are_refused(served, monkeypatch):
    host, port = served.url.removeprefix("http://").split(":")
    address = (host, int(port))
    with socket.create_connection(address, timeout=10) as line:
        line.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 2**16)
        assert b" 431 " in line.recv(2**16)
    with socket.create_connection(address, timeout=10) as line:
        line.sendall(b"no HTTP\r\n\r\n")
        status, _, body = line.recv(2**16).partition(b"\r\n\r\n")
        assert b" 400 " in status and json.loads(body)["error"]["type"] == "invalid_request_error"
    with socket.create_connection(address, timeout=10) as line:  # nothing comes into the midst of an answer
        stream = json.dumps({**CHAT, "max_tokens": 500, "ignore_eos": True, "stream": True}).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d"
        line.sendall(head % len(stream) + b"\r\n\r\n" + stream)
        got = line.recv(2**16)
        line.sendall(b"no HTTP\r\n\r\n")
        while piece := line.recv(2**16):
            got += piece
        assert got.count(b"HTTP/1.1") == 1 and b"[DONE]" not in got
    monkeypatch.setattr("dspark.serve.heads.SECONDS", 0.2)
    for begun in (b"", b"GET /health HTTP/1.1\r\nHo"):
        with socket.create_connection(address, timeout=10) as line:
            line.sendall(begun)
            assert line.recv(2**16) == b""
    with httpx.Client(base_url=served.url) as client:  # a connection that goes on
        for _ in range(3):
            assert client.get("/health", headers={"x-long": "a" * 2**15}).status_code == 200
            time.sleep(0.3)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_http_1_0_gets_a_body_without_chunks_that_ends_with_the_connection(either, is_streamed):
    host, port = either.url.removeprefix("http://").split(":")
    content = json.dumps({"prompt": "A river", "max_tokens": 8, "temperature": 0, "stream": is_streamed}).encode()
    with socket.create_connection((host, int(port)), timeout=60) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            % len(content)
            + content
        )
        head, _, body = b"".join(iter(lambda: client.recv(2**16), b"")).partition(b"\r\n\r\n")
    assert b" 200 " in head and b"chunked" not in head.lower()
    if is_streamed:
        events = body.split(b"\n\n")
        assert all(event.startswith(b"data: {") for event in events[:-2]) and events[-2:] == [b"data: [DONE]", b""]
    else:
        assert json.loads(body)["usage"]["completion_tokens"] == 8


def test_keys(target):
    with serving(Engine(target), api_keys=("one", "two")) as served:
        for headers in (
            {},
            {"Authorization": "Bearer three"},
            {"Authorization": "Basic one"},
            {"Authorization": "Bearer"},
        ):
            reply = post(served, CHAT, headers=headers)
            assert reply.status_code == 401
            assert reply.json()["error"]["code"] == "invalid_api_key"
        for key in ("one", "two"):
            assert post(served, CHAT, headers={"Authorization": f"Bearer {key}"}).status_code == 200
        assert httpx.get(served.url + "/v1/models").status_code == 401
        assert httpx.get(served.url + "/health").status_code == 200
        paths = httpx.get(served.url + "/openapi.json").json()["paths"]
        assert {path for path, on in paths.items() if "security" in next(iter(on.values()))} == {
            path for path in paths if path.startswith(("/v1", "/tokenize", "/detokenize"))
        }
        with pytest.raises(openai.AuthenticationError):
            served.client.chat.completions.create(model="tiny", messages=MESSAGES)


def test_cors_only_by_setting(served, target):
    asked = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    assert httpx.options(served.url + "/v1/chat/completions", headers=asked).status_code == 405
    with serving(Engine(target), cors_origins=("https://app.example",), api_keys=("one",)) as open_to:
        reply = httpx.options(open_to.url + "/v1/chat/completions", headers=asked)
        assert reply.headers["access-control-allow-origin"] == "https://app.example"
        refused = post(open_to, CHAT, headers={"Origin": "https://app.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://app.example"
        other = httpx.options(open_to.url + "/v1/models", headers={**asked, "Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


def test_a_full_queue_says_when_to_come_back(target):
    with serving(Engine(target, max_num_seqs=1), worker_options={"max_waiting": 1}) as served:

        async def crowd():
            async with httpx.AsyncClient(timeout=60) as client:
                url, body = served.url + "/v1/chat/completions", {**CHAT, "max_tokens": 60, "ignore_eos": True}
                return await asyncio.gather(*(client.post(url, json=body) for _ in range(12)))

        replies = asyncio.run(crowd())
        refused = [r for r in replies if r.status_code == 429]
        assert {r.status_code for r in replies} == {200, 429}
        assert all(int(r.headers["retry-after"]) >= 1 for r in refused)
        assert refused[0].json()["error"]["type"] == "rate_limit_error"
        served.settle()
        assert post(served, CHAT).status_code == 200


def test_a_request_that_takes_too_long_is_cancelled(target):
    with serving(Engine(target), request_seconds=0.1) as served:
        body = {**CHAT, "max_tokens": 4000, "ignore_eos": True}
        reply = post(served, body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "request_timeout")
        assert "request_timeout" in post(served, {**body, "stream": True}).text
        served.settle()


def test_request_ids_and_logs_without_text(served, caplog):
    with caplog.at_level(logging.INFO, logger="dspark.access"):
        reply = post(
            served, {**CHAT, "user": "secret", "seed": 0, "temperature": 0}, headers={"X-Request-Id": "mine-1"}
        )
        assert reply.headers["x-request-id"] == "mine-1"
        assert len(post(served, CHAT, headers={"X-Request-Id": "a b"}).headers["x-request-id"]) == 32
        assert httpx.get(served.url + "/nowhere").headers["x-request-id"]
    fields = next(r.fields for r in caplog.records if getattr(r, "fields", {}).get("request_id") == "mine-1")
    assert (fields["path"], fields["status"]) == ("/v1/chat/completions", 200)
    assert fields["completion_tokens"] == 4
    assert fields["finish_reasons"] == ["length"]
    assert "river" not in str(fields)
    assert "secret" not in str(fields)
    assert reply.json()["choices"][0]["message"]["content"] not in str(fields)


def test_readiness_is_apart_from_liveness(target):
    with serving(Engine(target)) as served:
        assert httpx.get(served.url + "/ready").status_code == 200
        served.worker.begin_drain()
        deadline = time.monotonic() + 30
        while served.worker.is_alive and time.monotonic() < deadline:
            time.sleep(0.01)
        assert httpx.get(served.url + "/ready").status_code == 503
        assert httpx.get(served.url + "/health").status_code == 200
        assert post(served, CHAT).json()["error"]["code"] == "shutting_down"


def test_a_drain_that_takes_too_long_says_so_to_the_client(target):
    with serving(Engine(target), drain_seconds=0.2) as served:
        body = {**CHAT, "max_tokens": 4000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", served.url + "/v1/chat/completions", json=body, timeout=60) as reply:
            events = reply.iter_lines()
            next(events)
            served.stop()
            rest = "\n".join(events)
        assert '"code":"shutting_down"' in rest
        assert rest.endswith("data: [DONE]\n")


def test_a_second_signal_waits_for_no_answer_and_tells_the_client(target, caplog):
    with serving(Engine(target), drain_seconds=1000.0) as served:
        body = {**CHAT, "max_tokens": 4000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", served.url + "/v1/chat/completions", json=body, timeout=60) as reply:
            events = reply.iter_lines()
            next(events)
            served.stop()
            served.stop()
            rest = "\n".join(events)
        assert '"code":"shutting_down"' in rest
        assert rest.endswith("data: [DONE]\n")
        served.ended()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_engine_faults_are_500_and_the_next_request_is_served(target, monkeypatch):
    with serving(Engine(target)) as served:
        expected = post(served, {**CHAT, "temperature": 0}).json()["choices"]
        extend = target.extend

        def broken(*arguments, **options):
            extend(*arguments, **options)
            raise RuntimeError("secret detail")

        monkeypatch.setattr(target, "extend", broken)
        reply = post(served, CHAT)
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "engine_error")
        assert "secret" not in reply.text
        with pytest.raises(openai.APIError, match="engine failed"):
            list(served.client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True))
        monkeypatch.undo()
        assert post(served, {**CHAT, "temperature": 0}).json()["choices"] == expected
        assert Engine(target).generate(["x"], SamplingParams(max_tokens=1))
