"""The server as `dspark serve` runs it, with the engine in a process of its own: the same answers, and nothing left behind."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cli.command import running_in_group
from dspark.errors import DSparkError, EngineLost
from dspark.serve.engine_end import EngineEnd
from dspark.serve.engine_process import EngineProcess
from dspark.serve.messages import received
from serve import engines
from serve.conftest import Served, in_two_processes
from serve.test_storms import BODY, OTHERS, streamed, together, whole

SCHEMA = {"type": "object", "properties": {"age": {"type": "integer", "maximum": 120}}, "required": ["age"]}
SCHEMA |= {"additionalProperties": False}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}


@pytest.fixture(scope="module")
def far() -> Iterator[Served]:
    with in_two_processes(engines.pair) as served:
        yield served


@pytest.fixture(scope="module")
def expected(target):
    from dspark import Engine, SamplingParams

    params = SamplingParams(temperature=1, seed=5, max_tokens=24)
    return Engine(target).generate(["What is a river?"], params)[0].text


def test_the_same_seed_gives_the_same_text_streamed_or_not_alone_and_among_others(far, expected):
    async def crowd(client):
        others = [
            (streamed if i % 2 else whole)(client, {**BODY, "messages": [{"role": "user", "content": text}], "seed": i})
            for i, text in enumerate(OTHERS * 3)
        ]
        return (await asyncio.gather(whole(client, BODY), streamed(client, BODY), *others))[:2]

    assert together(far, lambda client: whole(client, BODY)) == expected
    assert together(far, crowd) == [expected, expected]


def test_stop_strings_are_watched_for_by_the_engine(far, expected):
    word = expected.split()[3]
    body = {**BODY, "stop": word}
    for ours in (whole, streamed):
        assert together(far, lambda client, ours=ours: ours(client, body)) == expected[: expected.index(word)]
    far.settle()


def test_what_speculation_did_crosses_over_too(far):
    asked = {"dspark": True, "logprobs": True, "top_logprobs": 2, "ignore_eos": True}
    reply = httpx.post(far.url + "/v1/chat/completions", json={**BODY, **asked}, timeout=60).json()
    (choice,) = reply["choices"]
    stats = choice["dspark"]
    assert stats["accepted"] + stats["target_passes"] + 1 == reply["usage"]["completion_tokens"]
    assert stats["seed"] == 5 and stats["drafted"] > 0
    assert len(choice["logprobs"]["content"]) == reply["usage"]["completion_tokens"]
    unseeded = {**BODY, "seed": None, "dspark": True}
    first = httpx.post(far.url + "/v1/chat/completions", json=unseeded, timeout=60).json()["choices"][0]
    again = {**BODY, "seed": first["dspark"]["seed"]}
    assert together(far, lambda client: whole(client, again)) == first["message"]["content"]


def test_clients_that_leave_and_signals_meant_for_the_server_change_nothing(far, expected):
    rng = random.Random(2)
    os.kill(far.process.pid, signal.SIGINT)  # as Ctrl-C does, which reaches the whole group
    os.kill(far.process.pid, signal.SIGTERM)

    async def client_of(client, i):
        if i % 3 == 0:
            return await (streamed if i % 2 else whole)(client, BODY)
        leaving = {**BODY, "max_tokens": 2000, "ignore_eos": True}
        if i % 3 == 1:
            return await streamed(client, leaving, max_events=rng.randint(0, 6))
        if i % 2:
            leaving = {**BODY, "max_tokens": 2000, "response_format": FORMAT}
        with pytest.raises((asyncio.TimeoutError, httpx.HTTPError)):
            await asyncio.wait_for(whole(client, leaving), rng.random() / 100)
        return None

    texts = together(far, lambda client: asyncio.gather(*(client_of(client, i) for i in range(60))))
    assert texts[::3] == [expected] * 20
    far.settle()


def test_grammars_are_compiled_on_the_other_side(far):
    body = {**BODY, "max_tokens": 60, "response_format": FORMAT}
    text = together(far, lambda client: whole(client, body))
    assert json.loads(text)["age"] <= 120
    assert together(far, lambda client: streamed(client, body)) == text
    wrong = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "frob"}}}
    refused = httpx.post(far.url + "/v1/chat/completions", json={**body, "response_format": wrong})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "response_format")


def test_pages_show_what_the_engine_knows(far):
    together(far, lambda client: whole(client, BODY))
    page = httpx.get(far.url + "/metrics").text
    values = {s.name: s.value for family in text_string_to_metric_families(page) for s in family.samples}
    assert values["vllm:spec_decode_num_drafts_total"] > 0
    both = ("process_resident_memory_bytes", "dspark_front_process_resident_memory_bytes")
    assert min(values[name] for name in both) > 2**20
    event = httpx.get(far.url + "/dashboard/events", params={"once": True}).text
    assert json.loads(event.removeprefix("data: "))["totals"]["drafts"] > 0
    assert httpx.get(far.url + "/health").status_code == httpx.get(far.url + "/ready").status_code == 200


def test_a_broken_drafter_a_full_queue_and_then_a_killed_engine(expected):
    """Its death is the end of what it had, said to every client, and then of the server."""
    with in_two_processes(engines.pair, True, 1, 1) as served:
        url = served.url + "/v1/chat/completions"

        async def crowd(client):
            return await asyncio.gather(*(client.post(url, json=BODY) for _ in range(6)))

        replies = together(served, crowd)
        texts = [r.json()["choices"][0]["message"]["content"] for r in replies if r.status_code == 200]
        refused = [r for r in replies if r.status_code == 429]
        assert set(texts) == {expected} and refused and len(texts) + len(refused) == 6
        assert all(int(r.headers["retry-after"]) >= 1 for r in refused)
        faults = [
            line for line in httpx.get(served.url + "/metrics").text.splitlines() if "draft_faults_total{" in line
        ]
        assert float(faults[0].split()[-1]) > 0

        long = {**BODY, "max_tokens": 4000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", url, json=long, timeout=60) as reply:
            events = reply.iter_lines()
            next(events)
            served.process.kill()
            rest = "\n".join(events)
        assert '"code":"engine_error"' in rest and rest.endswith("data: [DONE]\n")
        served.ended()
        assert served.backend.has_failed and served.backend.num_open == 0

        async def asked_again() -> list[int]:
            transport = httpx.ASGITransport(served.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                replies = [await client.get(path) for path in ("/health", "/ready", "/metrics")]
                return [r.status_code for r in [*replies, await client.post("/v1/chat/completions", json=BODY)]]

        assert asyncio.run(asked_again()) == [503] * 4


def test_an_engine_that_is_stuck_is_said_to_be_until_it_goes_on(expected, tmp_path):
    """In a step, which it says itself, and stopped altogether, when it says nothing."""
    gate = tmp_path / "gate"

    def health_becomes(status: int) -> None:
        deadline = time.monotonic() + 60
        while (reply := httpx.get(served.url + "/health", timeout=60)).status_code != status:
            assert time.monotonic() < deadline, reply.text
            time.sleep(0.1)
        assert (status == 200) or reply.json()["error"]["message"] == "the engine is stuck"

    with in_two_processes(engines.pair, False, 32, 256, 0.3, gate) as served:
        served.backend._stuck_seconds = 60.0  # so that it is the engine that says so
        with ThreadPoolExecutor(1) as asking:
            answer = asking.submit(together, served, lambda client: whole(client, BODY))
            health_becomes(503)
            gate.touch()
            assert answer.result(60) == expected
        health_becomes(200)
        served.backend._stuck_seconds = 0.3
        os.kill(served.process.pid, signal.SIGSTOP)
        health_becomes(503)
        os.kill(served.process.pid, signal.SIGCONT)
        health_becomes(200)


def test_the_engine_waits_for_no_server_that_is_slow_to_hear():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(10)
        end, messages = EngineEnd(theirs), [("step", number, bytes(2**16)) for number in range(50)]
        for message in messages:
            end.send(*message)
        assert list(itertools.islice(received(ours), len(messages))) == messages


@pytest.mark.parametrize(("make", "error"), [(engines.refusing, DSparkError), (engines.failing, EngineLost)])
def test_an_engine_that_cannot_be_made_is_said_to_be(make, error, capfd):
    with EngineProcess(make) as engine, pytest.raises(error) as said:
        engine.wait_until_ready()
    assert (engine.process.exitcode is not None, engine.has_failed) == (True, True)
    assert "no such model" in str(said.value) or "something nobody thought of" in capfd.readouterr().err


def test_the_engine_ends_when_the_server_is_killed():
    script = (
        "from dspark.serve.engine_process import EngineProcess; from serve import engines\n"
        "if __name__ == '__main__': print(EngineProcess(engines.for_ever).process.pid, flush=True); engines.for_ever()"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    server = subprocess.Popen(
        [sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    child = int(server.stdout.readline())
    assert child in running_in_group(server.pid)
    server.kill()
    server.wait()
    server.stdout.close()
    deadline = time.monotonic() + 60
    while running_in_group(server.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not running_in_group(server.pid)
