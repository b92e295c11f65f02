"""A real server on a free loopback port: uvicorn in a thread, the embedded pair in float32 behind it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

from dspark import Engine, SamplingParams, load_drafter, load_target
from dspark.engine.worker import Worker
from dspark.serve.app import make_app
from dspark.serve.backend import Backend, InProcess, Watched
from dspark.serve.dashboard import make_dashboard
from dspark.serve.engine_process import EngineProcess
from dspark.serve.process import Server, listen
from dspark.serve.settings import ServeSettings
from serve import engines
from serve.engines import assert_all_free

if TYPE_CHECKING:
    from dspark.monitor.monitoring import Monitoring
    from dspark.target.kv_cache import KVCache


_THREADS = 8  # of an engine's process: main, steps, watchdog, hearing, sending, grammars, pages, and one of tqdm


@dataclass
class Served:
    """Where a test server listens, and what is behind it."""

    backend: Any
    app: Any
    server: Server
    url: str
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread
    cache: KVCache | None = None  # of an engine beside it
    faults: Path | None = None  # where an engine in a process of its own is told what is to break

    def stop(self) -> None:
        """What SIGTERM does."""
        self.loop.call_soon_threadsafe(self.server.stop)

    def ended(self) -> None:
        """Wait for the server's own end."""
        self.thread.join(30)
        assert not self.thread.is_alive()

    @property
    def worker(self) -> Worker:
        return self.backend.worker

    @property
    def process(self):
        return self.backend.process

    @property
    def engine(self) -> Engine:
        return self.worker.engine

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key="any", max_retries=0, timeout=60)

    def metric(self, name: str) -> float:
        """Added up over series whose names and labels contain this."""
        lines = httpx.get(self.url + "/metrics", timeout=60).raise_for_status().text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if name in line and not line.startswith("#"))

    def settle(self) -> None:
        """Wait until nothing runs; then every slot must be free, and no thread be there but those that always are."""
        deadline = time.monotonic() + 60
        while self.backend.num_open or self._num_in_use():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if self.cache:
            assert_all_free(self.cache)
        else:
            assert self.metric("test_threads") <= _THREADS

    def _num_in_use(self) -> float:
        return len(self.cache.request_ids) if self.cache else self.metric("test_slots_in_use")


@contextmanager
def http(backend: Backend, drain_seconds: float, **settings) -> Iterator[Served]:
    """A server over a backend, in a thread that ends with the test."""
    dashboard = make_dashboard(backend.snapshot, is_ending=lambda: backend.is_draining)
    app = make_app(backend, ServeSettings(**{"model_names": ("tiny",), **settings}), [dashboard])
    listening = listen("127.0.0.1", 0)
    server = Server(app, backend, drain_seconds)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve(sockets=[listening])))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield Served(backend, app, server, f"http://127.0.0.1:{listening.getsockname()[1]}", loop, thread)
    finally:
        loop.call_soon_threadsafe(backend.cancel_all)  # so that no client waits for an answer
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
        loop.close()


@contextmanager
def serving(
    engine: Engine, worker_options=None, monitoring: Monitoring | None = None, drain_seconds=10.0, **settings
) -> Iterator[Served]:
    """Beside its engine. However a test ends, it leaves no thread and no slot of the target that all tests share."""
    before = set(threading.enumerate())
    worker = Worker(engine, **(worker_options or {})).start()
    try:
        pages = (monitoring.metrics.render, monitoring.snapshot) if monitoring else ()
        with http(InProcess(Watched(worker, *pages)), drain_seconds, **settings) as served:
            served.cache = engine.target.cache
            yield served
            served.settle()
    finally:
        worker.close()
        assert not {t for t in threading.enumerate() if t.name.startswith("dspark-")} - before
        assert_all_free(engine.target.cache)


@contextmanager
def in_two_processes(make, *arguments) -> Iterator[Served]:
    """As `dspark serve` does it: `make` runs in the engine's process, of which nothing is left."""
    with EngineProcess(engines.leaving_nothing, make, *arguments) as engine:
        engine.wait_until_ready()
        with http(engine, 10.0) as served:
            yield served
            if engine.is_alive:
                served.settle()
        was_lost = engine.has_failed
    assert not engine.process.is_alive()
    assert was_lost or engine.process.exitcode == 0


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


@pytest.fixture(scope="package")
def far() -> Iterator[Served]:
    """The same in two processes, as users run it."""
    with in_two_processes(engines.pair) as one:
        yield one


@pytest.fixture(params=["served", "far"])
def either(request) -> Served:
    return request.getfixturevalue(request.param)


@pytest.fixture
def plain(target):
    """`plain(prompt, **params)`: what plain decoding gives in an engine of its own."""

    def generate(prompt, raw=False, **params):
        return Engine(target).generate([prompt], SamplingParams(**params), raw=raw)[0]

    return generate
