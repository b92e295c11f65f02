"""Crowds, and clients that behave badly: no slot leaks, no thread stays, nobody else's answer changes."""

from __future__ import annotations

import asyncio
import json
import random
import socket

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks as conformance

from dspark import Engine
from serve.conftest import serving

BODY = {"messages": [{"role": "user", "content": "What is a river?"}], "temperature": 1, "seed": 5, "max_tokens": 24}
OTHERS = ["What is a harbour?", "Tom has 3 apples.", "Show me how to list files", "Hi", "What does the word cold mean?"]


_TRUE = [
    not_a_server_error,
    conformance.status_code_conformance,
    conformance.content_type_conformance,
    conformance.response_headers_conformance,
    conformance.response_schema_conformance,
]


async def whole(client: httpx.AsyncClient, body: dict) -> str:
    reply = await client.post("/v1/chat/completions", json=body)
    reply.raise_for_status()
    return reply.json()["choices"][0]["message"]["content"]


async def streamed(client: httpx.AsyncClient, body: dict, max_events: int = 10**9, pause: float = 0.0) -> str:
    text = ""
    async with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            max_events -= 1
            if max_events < 0:
                return text  # and the connection is closed
            if line.startswith("data: {"):
                choices = json.loads(line[6:])["choices"]
                text += "".join(choice["delta"].get("content", "") for choice in choices)
                await asyncio.sleep(pause)
    return text


def together(served, work):
    async def run():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=served.url, timeout=120, limits=limits) as client:
            return await work(client)

    return asyncio.run(run())


def test_the_same_seed_gives_the_same_text_alone_and_among_others(served, plain):
    expected = plain("What is a river?", temperature=1, seed=5, max_tokens=24).text
    rng = random.Random(1)

    async def crowd(client):
        others = []
        for i in range(31):
            other = {
                **BODY,
                "messages": [{"role": "user", "content": OTHERS[i % 5]}],
                "seed": i,
                "max_tokens": rng.randint(4, 40),
            }
            others.append((streamed if i % 2 else whole)(client, other))
        ours = [whole(client, BODY), streamed(client, BODY)]
        return (await asyncio.gather(*others[:16], *ours, *others[16:]))[16:18]

    assert together(served, lambda client: whole(client, BODY)) == expected
    assert together(served, crowd) == [expected, expected]


def test_half_of_two_hundred_clients_leave(either):
    expected = together(either, lambda client: whole(client, BODY))
    rng = random.Random(2)

    async def client_of(client, i):
        if i % 2:
            return await (streamed if i % 4 == 1 else whole)(client, BODY)
        leaving = {**BODY, "max_tokens": 2000, "ignore_eos": True}
        if i % 4 == 0:
            return await streamed(client, leaving, max_events=rng.randint(0, 6))
        if i % 8 == 2:
            leaving = {**BODY, "max_tokens": 2000, "response_format": {"type": "json_object"}}
        with pytest.raises((asyncio.TimeoutError, httpx.HTTPError)):
            await asyncio.wait_for(whole(client, leaving), rng.random() / 10)
        return None

    texts = together(either, lambda client: asyncio.gather(*(client_of(client, i) for i in range(200))))
    assert [t for i, t in enumerate(texts) if i % 2] == [expected] * 100
    either.settle()
    assert together(either, lambda client: whole(client, BODY)) == expected


def test_a_storm_of_clients_that_leave_at_once(either):
    expected = together(either, lambda client: whole(client, BODY))

    async def leaving(client):
        tasks = [
            asyncio.ensure_future(whole(client, {**BODY, "max_tokens": 2000, "ignore_eos": True})) for _ in range(100)
        ]
        await asyncio.sleep(0.3)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return await whole(client, BODY)

    assert together(either, leaving) == expected
    either.settle()


def test_a_slow_reader_slows_nobody(either, plain):
    expected = plain("What is a river?", temperature=1, seed=5, max_tokens=24).text
    long = {**BODY, "max_tokens": 1500, "ignore_eos": True}
    host, port = either.url.removeprefix("http://").split(":")
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        slow.connect((host, int(port)))
        content = json.dumps({**long, "stream": True}).encode()
        slow.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(content) + content
        )
        slow.recv(100)  # and never again
        assert together(either, lambda client: whole(client, BODY)) == expected
    either.settle()


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
def test_bodies_of_every_kind_get_an_answer(small, path, mode):
    """schemathesis writes them from the served OpenAPI, right ones and wrong ones: answers are as it says, and no 500."""
    schema = schemathesis.openapi.from_url(small.url + "/openapi.json")
    operation = schema[path]["POST"]
    statuses: set[int] = set()

    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
    @given(case=operation.as_strategy(mode))
    def fuzz(case):
        reply = case.call(timeout=60)
        statuses.add(reply.status_code)
        case.validate_response(reply, checks=_TRUE)
        assert reply.headers["x-request-id"]

    fuzz()
    assert statuses
    assert httpx.post(small.url + "/v1/chat/completions", json={**BODY, "max_tokens": 2}).status_code == 200


@pytest.fixture(scope="module")
def small(target):
    """A server whose answers are short, whatever it is asked for."""
    with serving(Engine(target, max_length=32)) as served:
        yield served
