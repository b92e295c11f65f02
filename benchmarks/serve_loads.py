"""One load for the server, over HTTP, and for an engine in this process."""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx

from dspark import Engine, SamplingParams
from dspark.types import Request

RAMP_SECONDS = 0.5  # over which clients of a closed loop begin, one after another: a flash crowd is another load
Asked = Iterator[tuple[str, dict[str, Any]]]  # texts, and what else a request's body holds


@dataclass
class Load:
    """What one side did with one load. Seconds since it began.

    cpu_seconds  of this side's whole process meanwhile, where it was asked for
    arrivals     of requests
    events       of each request: when tokens of it came
    """

    side: str
    clients: int
    num_tokens: int = 0
    num_failed: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    events: list[list[float]] = field(default_factory=list)

    def arrive(self, at: float) -> list[float]:
        """A request comes; where its events go."""
        self.arrivals.append(at)
        self.events.append([])
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


def own(
    engine: Engine, texts: Sequence[str], clients: int, tokens: int, arrivals: Sequence[float] | None = None
) -> Load:
    """The engine alone, stepped here: as many requests at once, the next as soon as one has ended.

    arrivals  when requests come instead, whether or not others have ended
    """
    load, began = Load("engine" if arrivals is None else "engine, same arrivals", clients), time.perf_counter()
    load.cpu_seconds = -time.process_time()
    waiting, running, num_seen = deque(enumerate(texts)), dict[Request, list[float]](), dict[Request, int]()
    while waiting or running:
        now = time.perf_counter() - began
        num_begun = min(clients, 1 + int(now * clients / RAMP_SECONDS))
        while waiting and (len(running) < num_begun if arrivals is None else arrivals[waiting[0][0]] <= now):
            seed, text = waiting.popleft()
            params = SamplingParams(temperature=1, seed=seed, max_tokens=tokens, ignore_eos=True)
            running[engine.submit(text, params)] = load.arrive(now if arrivals is None else arrivals[seed])
        if not running and arrivals is not None:
            time.sleep(max(0.0, arrivals[waiting[0][0]] - now))
            continue
        engine.step()
        now = time.perf_counter() - began
        for request, events in list(running.items()):
            if len(request.generated) > num_seen.get(request, 0):
                events.append(now)
                num_seen[request] = len(request.generated)
            if request.finish_reason:
                load.num_tokens += len(request.generated)
                del running[request]
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
    """So many clients, each of whom asks again as soon as it has its answer."""
    load = Load(side, clients)
    asyncio.run(ask_closed(url, load, requests))
    return load


async def ask_closed(url: str, load: Load, requests: Asked) -> None:
    async with _client(url) as client:
        began = time.perf_counter()

        async def one(number: int) -> None:
            await asyncio.sleep(number * RAMP_SECONDS / load.clients)
            for text, asked in requests:
                await _ask(client, load, began, text, asked)

        await asyncio.gather(*(one(number) for number in range(load.clients)))
        load.seconds = time.perf_counter() - began


async def ask_open(url: str, load: Load, requests: Asked, rate: float) -> None:
    """Requests at random, so many a second, whether or not earlier ones have ended."""
    chance = random.Random(0)
    async with _client(url) as client:
        began, asking = time.perf_counter(), []
        for text, asked in requests:
            asking.append(asyncio.ensure_future(_ask(client, load, began, text, asked)))
            await asyncio.sleep(chance.expovariate(rate))
        await asyncio.gather(*asking)
        load.seconds = time.perf_counter() - began


async def _ask(client: httpx.AsyncClient, load: Load, began: float, text: str, asked: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": text}], "stream": True, **asked}
    body["stream_options"] = {"include_usage": True}
    events, usage = load.arrive(time.perf_counter() - began), None
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            reply.raise_for_status()
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                now, event = time.perf_counter() - began, json.loads(line[6:])
                usage = event.get("usage") or usage
                if any(choice["delta"].get("content") for choice in event["choices"]):
                    events.append(now)
    except httpx.HTTPError as error:
        print(f"a request failed: {error!r}", file=sys.stderr)
        load.num_failed += 1
        return
    load.num_tokens += usage["completion_tokens"] if usage else len(events)


def _client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None))
