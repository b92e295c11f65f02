"""The server as `dspark serve` runs it, with the engine in a process of its own: the same answers, and nothing left behind."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
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
def frail(tmp_path_factory) -> Iterator[Served]:
    """One that answers one request at a time, and of which tests say what breaks."""
    faults = tmp_path_factory.mktemp("faults")
    with in_two_processes(engines.pair, 1, 1, 0.3, 1.0, faults) as served:
        served.backend._stuck_seconds = 60.0  # so that it is the engine that says so
        served.faults = faults
        yield served


@contextmanager
def broken(served, name: str) -> Iterator[None]:
    (served.faults / name).touch()
    yield
    (served.faults / name).unlink()


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
    stop = expected[len(expected) // 2 :][:3]
    body = {**BODY, "stop": stop}
    for ours in (whole, streamed):
        assert together(far, lambda client, ours=ours: ours(client, body)) == expected[: expected.index(stop)]
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


def test_signals_that_are_meant_for_the_server_do_not_end_the_engine(far, expected):
    os.kill(far.process.pid, signal.SIGINT)  # as Ctrl-C does, which reaches the whole group
    os.kill(far.process.pid, signal.SIGTERM)
    assert together(far, lambda client: whole(client, BODY)) == expected


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


def test_a_corrupted_drafter_costs_acceptance_and_a_corrupted_answer_a_canary(frail, expected):
    def ask(num: int) -> None:
        for i in range(num):
            body = {**BODY, "messages": [{"role": "user", "content": OTHERS[i % 5]}], "seed": i, "max_tokens": 40}
            together(frail, lambda client, body=body: whole(client, body))

    def canaries(outcome: str, num: float) -> None:
        deadline = time.monotonic() + 60
        while (seen := frail.metric(f'canaries_total{{outcome="{outcome}"')) < num and time.monotonic() < deadline:
            time.sleep(0.05)
        assert seen == num

    alarm = 'drift_alarms_total{request_class="sampled",signal="first_token_acceptance"'
    ask(5)
    canaries("equal", 5)
    assert frail.metric(alarm) == 0
    with broken(frail, "drafter-corrupt"):
        ask(3)
        assert together(frail, lambda client: whole(client, BODY)) == expected
        canaries("equal", 9)
        assert frail.metric(alarm) > 0
    with broken(frail, "verdicts-wrong"):
        assert together(frail, lambda client: whole(client, BODY)) != expected
    canaries("unexplained", 1)
    assert together(frail, lambda client: whole(client, BODY)) == expected
    canaries("equal", 10)
    frail.settle()


@pytest.mark.parametrize("clock", ["time", "perf_counter"])
def test_clocks_that_jump_in_both_processes_change_no_answer(frail, expected, clock):
    with broken(frail, "clock-" + clock), engines.jumping(clock):
        for ours in (whole, streamed):
            assert together(frail, lambda client, ours=ours: ours(client, BODY)) == expected
        assert httpx.get(frail.url + "/ready").status_code == 200
    assert together(frail, lambda client: whole(client, BODY)) == expected
    frail.settle()


def test_an_engine_that_is_stuck_is_said_to_be_until_it_goes_on(frail, expected):
    """In a step, which it says itself, and stopped altogether, when it says nothing."""

    def health_becomes(status: int) -> None:
        deadline = time.monotonic() + 60
        while (reply := httpx.get(frail.url + "/health", timeout=60)).status_code != status:
            assert time.monotonic() < deadline, reply.text
            time.sleep(0.1)
        assert (status == 200) or reply.json()["error"]["message"] == "the engine is stuck"

    with ThreadPoolExecutor(1) as asking:
        with broken(frail, "stuck"):
            answer = asking.submit(together, frail, lambda client: whole(client, BODY))
            health_becomes(503)
        assert answer.result(60) == expected
    health_becomes(200)
    frail.backend._stuck_seconds = 0.3
    os.kill(frail.process.pid, signal.SIGSTOP)
    health_becomes(503)
    os.kill(frail.process.pid, signal.SIGCONT)
    health_becomes(200)


def test_clients_that_are_refused_come_back_when_they_were_told_to(frail, expected):
    statuses = []

    async def note(reply: httpx.Response) -> None:
        statuses.append(reply.status_code)

    async def crowd():
        http = httpx.AsyncClient(event_hooks={"response": [note]})
        client = openai.AsyncOpenAI(base_url=frail.url + "/v1", api_key="any", max_retries=9, http_client=http)
        async with client:
            return await asyncio.gather(*(client.chat.completions.create(model="tiny", **BODY) for _ in range(4)))

    assert [answer.choices[0].message.content for answer in asyncio.run(crowd())] == [expected] * 4
    assert statuses.count(200) == 4 and set(statuses) == {200, 429}
    frail.settle()


def test_a_drafter_that_raises_a_full_queue_and_then_a_killed_engine(frail, expected):
    """Its death is the end of what it had, said to every client, and then of the server."""
    url = frail.url + "/v1/chat/completions"

    async def crowd(client):
        return await asyncio.gather(*(client.post(url, json=BODY) for _ in range(6)))

    with broken(frail, "drafter-raises"):
        replies = together(frail, crowd)
    texts = [r.json()["choices"][0]["message"]["content"] for r in replies if r.status_code == 200]
    refused = [r for r in replies if r.status_code == 429]
    assert set(texts) == {expected} and refused and len(texts) + len(refused) == 6
    assert all(int(r.headers["retry-after"]) >= 1 for r in refused)
    assert frail.metric("draft_faults_total{") > 0
    frail.settle()
    assert together(frail, lambda client: whole(client, BODY)) == expected

    long = {**BODY, "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", url, json=long, timeout=60) as reply:
        events = reply.iter_lines()
        next(events)
        frail.process.kill()
        rest = "\n".join(events)
    assert '"code":"engine_error"' in rest and rest.endswith("data: [DONE]\n")
    frail.ended()
    assert frail.backend.has_failed and frail.backend.num_open == 0

    async def asked_again() -> list[int]:
        transport = httpx.ASGITransport(frail.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            replies = [await client.get(path) for path in ("/health", "/ready", "/metrics")]
            return [r.status_code for r in [*replies, await client.post("/v1/chat/completions", json=BODY)]]

    assert asyncio.run(asked_again()) == [503] * 4


def test_the_engine_waits_for_no_server_that_is_slow_to_hear():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(10)
        end, messages = EngineEnd(theirs), [("step", number, bytes(2**16)) for number in range(50)]
        for message in messages:
            end.send(*message)
        assert list(itertools.islice(received(ours), len(messages))) == messages
        end.close()


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
