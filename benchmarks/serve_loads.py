"""One load for the server, over HTTP, and for an engine in this process."""

from __future__ import annotations

import asyncio
import json
import math
import random
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import httptools
import uvloop

from dspark import Engine, SamplingParams
from dspark.types import Request

RAMP_SECONDS = 0.5  # over which clients of a closed loop begin, one after another: a flash crowd is another load
# Clients of a closed loop read for up to so long before they ask again. One that asks at once comes when a step has just
# begun, each time, and waits for all of it; the same arrivals meet the engine's steps anywhere.
PAUSE_SECONDS = 0.1
_SO_TIMESTAMPNS = 35  # which the socket module does not name
Asked = Iterator[tuple[str, dict[str, Any]]]  # texts, and what else a request's body holds


@dataclass
class Load:
    """What one side did with one load. Seconds since it began.

    began           on the clock that all processes of a machine share
    cpu_seconds     processor time of this side's whole process meanwhile, where it was asked for
    client_seconds  processor time of the clients, who may share the server's cores
    arrivals        of requests: when they were sent
    events          of each request: when tokens of it came
    at_socket       of each of a server's: when the client's socket had it, which then waits for the client
    tokens          by seed: what the engine wrote
    """

    side: str
    clients: int
    num_tokens: int = 0
    num_failed: int = 0
    began: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    client_seconds: float = 0.0
    seeds: list[int] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    events: list[list[float]] = field(default_factory=list)
    at_socket: list[list[float]] = field(default_factory=list)
    tokens: dict[int, list[int]] = field(default_factory=dict)

    def arrive(self, at: float, seed: int = 0) -> list[float]:
        """A request comes; where its events go."""
        self.seeds.append(seed)
        self.arrivals.append(at)
        self.events.append([])
        self.at_socket.append([])
        return self.events[-1]

    @property
    def speed(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def first_token(self) -> list[float]:
        """By request, from its arrival on; NaN where none came."""
        return [events[0] - at if events else math.nan for at, events in zip(self.arrivals, self.events, strict=True)]

    @property
    def gaps(self) -> list[float]:
        """Between the events of each request."""
        return [later - earlier for events in self.events for earlier, later in pairwise(events)]


# -- the engine -------------------------------------------------------------------------------------------------------


def own(engine: Engine, texts: Sequence[str], clients: int, tokens: int) -> Load:
    """The engine alone, stepped here, for clients like those of the server."""
    load, began = Load("engine", clients), time.perf_counter()
    load.cpu_seconds, pauses = -time.process_time(), random.Random(0)
    waiting, running, num_seen = deque(enumerate(texts)), dict[Request, list[float]](), dict[Request, int]()
    asks = [n * RAMP_SECONDS / clients for n in range(clients)]  # a heap, being in order
    while waiting or running:
        now = time.perf_counter() - began
        while waiting and asks and asks[0] <= now:
            seed, text = waiting.popleft()
            params = SamplingParams(temperature=1, seed=seed, max_tokens=tokens, ignore_eos=True)
            running[engine.submit(text, params)] = load.arrive(heappop(asks))
        if not running:
            time.sleep(max(0.0, asks[0] - now))
            continue
        engine.step()
        now = time.perf_counter() - began
        for request, events in list(running.items()):
            if len(request.generated) > num_seen.get(request, 0):
                events.append(now)
                num_seen[request] = len(request.generated)
            if request.finish_reason:
                load.num_tokens += len(request.generated)
                load.tokens[request.seed] = request.generated
                del running[request]
                heappush(asks, now + pauses.uniform(0, PAUSE_SECONDS))
    load.seconds = time.perf_counter() - began
    load.cpu_seconds += time.process_time()
    return load


# -- the server -------------------------------------------------------------------------------------------------------


def sampled(texts: Sequence[str], tokens: int) -> Asked:
    """What `own` asks of the engine, as the API says it."""
    for seed, text in enumerate(texts):
        yield text, {"temperature": 1, "seed": seed, "max_tokens": tokens, "ignore_eos": True}


def greedy(texts: Sequence[str], tokens: int, model: str) -> Asked:
    """What every server understands."""
    for text in texts:
        yield text, {"temperature": 0, "max_tokens": tokens, "model": model}


def closed(side: str, url: str, clients: int, requests: Asked) -> Load:
    """So many clients, each of whom asks again soon after its answer has ended."""
    load = Load(side, clients)
    uvloop.run(ask_closed(url, load, requests))
    return load


async def ask_closed(url: str, load: Load, requests: Asked, pause_seconds: float = PAUSE_SECONDS) -> None:
    load.began, pauses = time.monotonic(), random.Random(0)
    load.client_seconds = -time.process_time()

    async def one(number: int) -> None:
        await asyncio.sleep(number * RAMP_SECONDS / load.clients)
        connection = await connect(url)
        for text, asked in requests:
            await _ask(connection, load, text, asked)
            await asyncio.sleep(pauses.uniform(0, pause_seconds))
        connection.close()

    await asyncio.gather(*(one(number) for number in range(load.clients)))
    load.seconds = max(events[-1] for events in load.events if events)
    load.client_seconds += time.process_time()


async def ask_open(url: str, load: Load, requests: Asked, rate: float) -> None:
    """Requests at random, so many a second, whether or not earlier ones have ended."""
    chance = random.Random(0)
    load.began, asking = time.monotonic(), []

    async def one(text: str, asked: dict[str, Any]) -> None:
        connection = await connect(url)
        await _ask(connection, load, text, asked)
        connection.close()

    for text, asked in requests:
        asking.append(asyncio.ensure_future(one(text, asked)))
        await asyncio.sleep(chance.expovariate(rate))
    await asyncio.gather(*asking)
    load.seconds = time.monotonic() - load.began


async def _ask(connection: Connection, load: Load, text: str, asked: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": text}], "stream": True, **asked}
    body["stream_options"] = {"include_usage": True}
    written = json.dumps(body).encode()
    events, usage, rest = load.arrive(time.monotonic() - load.began, asked.get("seed", 0)), None, b""
    at_socket = load.at_socket[-1]
    status, pieces = await connection.ask("/v1/chat/completions", written)
    for at, reached, piece in pieces:
        *whole, rest = (rest + piece).split(b"\n\n")
        for event in (json.loads(data[6:]) for data in whole if data.startswith(b"data: {")):
            usage = event.get("usage") or usage
            if any(choice["delta"].get("content") for choice in event.get("choices", ())):
                events.append(at - load.began)
                at_socket.append(reached - load.began)
    load.num_tokens += usage["completion_tokens"] if usage else len(events)
    if status != 200 or not events:
        print(f"a request failed with status {status}: {rest.decode(errors='replace')[:300]}", file=sys.stderr)
        load.num_failed += 1


class Connection:
    """HTTP/1.1 with next to no work for a piece of an answer, because clients share the server's cores: it is read later.

    On Linux the kernel says when the piece had come to the socket, before this process had a core to take it.
    """

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._done = asyncio.get_running_loop().create_future()
        if sys.platform == "linux":
            connected.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        asyncio.get_running_loop().add_reader(connected, self._read)

    async def ask(self, path: str, body: bytes) -> tuple[int, list[tuple[float, float, bytes]]]:
        """The status, and pieces of the reply's body with the moments when they were read and when they had come."""
        self._done, self._pieces = asyncio.get_running_loop().create_future(), list[tuple[float, float, bytes]]()
        self._parser = httptools.HttpResponseParser(self)
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        data = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        await asyncio.get_running_loop().sock_sendall(self._socket, data)
        await asyncio.wait_for(self._done, 600)
        return self._parser.get_status_code(), self._pieces

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()

    def _read(self) -> None:
        try:
            data, told, _, _ = self._socket.recvmsg(2**16, 64)
        except ConnectionError:
            data, told = b"", []
        self._now = self._reached = time.monotonic()
        if told:
            seconds, nanoseconds = struct.unpack("@ll", told[0][2])
            self._reached -= time.time() - (seconds + 1e-9 * nanoseconds)
        if data:
            self._parser.feed_data(data)
            return
        asyncio.get_running_loop().remove_reader(self._socket)
        if not self._done.done():
            self._done.set_exception(ConnectionError("the server closed the connection in the midst of an answer"))

    def on_body(self, body: bytes) -> None:
        self._pieces.append((self._now, self._reached, body))

    def on_message_complete(self) -> None:
        self._done.set_result(None)


async def connect(url: str) -> Connection:
    address = urlsplit(url)
    made = socket.socket()
    made.setblocking(False)
    await asyncio.get_running_loop().sock_connect(made, (address.hostname, address.port))
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Connection(made)
