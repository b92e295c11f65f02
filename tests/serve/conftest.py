"""A real server on a free loopback port: uvicorn in a thread, the embedded pair in float32 behind it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import openai
import pytest

from dspark import Engine, SamplingParams, load_drafter, load_target
from dspark.engine.worker import Worker
from dspark.serve.app import make_app
from dspark.serve.process import Server, listen
from dspark.serve.settings import ServeSettings
from dspark.target.kv_cache import KVCache


@dataclass
class Served:
    """Where a test server listens, and what is behind it."""

    worker: Worker
    server: Server
    url: str
    loop: asyncio.AbstractEventLoop

    def stop(self) -> None:
        """What SIGTERM does."""
        self.loop.call_soon_threadsafe(self.server.stop)

    @property
    def engine(self) -> Engine:
        return self.worker.engine

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key="any", max_retries=0, timeout=60)

    def settle(self) -> None:
        """Wait until nothing runs; then every slot must be free."""
        cache = self.engine.target.cache
        deadline = time.monotonic() + 60
        while (self.worker.num_open or cache.request_ids) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert self.worker.num_open == 0
        assert_all_free(cache)


def assert_all_free(cache: KVCache) -> None:
    cache.check()
    assert cache.num_free_slots == cache.limit


@contextmanager
def serving(engine: Engine, worker_options=None, drain_seconds=10.0, **settings) -> Iterator[Served]:
    """However a test ends, it leaves no thread and no slot of the target that all tests share."""
    before = set(threading.enumerate())
    worker = Worker(engine, **(worker_options or {})).start()
    app = make_app(worker, ServeSettings(**{"model_names": ("tiny",), **settings}))
    listening = listen("127.0.0.1", 0)
    server = Server(app, worker, drain_seconds)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve(sockets=[listening])))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        served = Served(worker, server, f"http://127.0.0.1:{listening.getsockname()[1]}", loop)
        yield served
        served.settle()
    finally:
        worker.close()  # first, so that no client waits for an answer
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
        loop.close()
        assert not {t for t in threading.enumerate() if t.name.startswith("dspark-")} - before
        assert_all_free(engine.target.cache)


@pytest.fixture(scope="package")
def target():
    return load_target("tiny", dtype="float32", device="cpu")


@pytest.fixture(scope="package")
def served(target) -> Iterator[Served]:
    """One server for all tests that leave it as they found it."""
    # always drafting, so that what drafts change is seen; `auto` would stop where it does not pay
    engine = Engine(target, load_drafter("dspark", target), scheduler="fixed:7")
    with serving(engine) as one:
        yield one


@pytest.fixture
def plain(target):
    """`plain(prompt, **params)`: what plain decoding gives in an engine of its own."""

    def generate(prompt, raw=False, **params):
        return Engine(target).generate([prompt], SamplingParams(**params), raw=raw)[0]

    return generate
