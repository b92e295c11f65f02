"""The server as a process: sockets, signals, a graceful end, logs that machines can read."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from dspark.engine.worker import Worker
from dspark.errors import InvalidConfiguration

log = logging.getLogger(__name__)

# The engine's thread and the event loop share the interpreter: how long one waits for the other to give it up.
_SWITCH_SECONDS = 0.0005
_GRACE_SECONDS = 5.0  # for telling clients of requests that were cancelled when draining took too long


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and whatever `extra={"fields": {...}}` adds."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line = {
            "time": moment,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def log_to_stderr(level: str) -> None:
    """Everything of this package and of uvicorn as JSON lines; uvicorn's own access log is replaced by `dspark.access`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    for name in ("dspark", "uvicorn"):
        logging.getLogger(name).setLevel(level.upper())


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        raise InvalidConfiguration(f"cannot listen on {host}:{port}: {error}; use another --host or --port") from error
    return bound


def serve(app: FastAPI, worker: Worker, listening: socket.socket, drain_seconds: float) -> None:
    """Answer until SIGTERM or Ctrl-C; then finish what was taken, for `drain_seconds` at most. A second signal ends at once."""
    gc.freeze()  # models and libraries stay: no collection has to look through them, which takes tenths of a second
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        Server(app, worker, drain_seconds).run(sockets=[listening])
    finally:
        worker.close()


class Server(uvicorn.Server):
    """Lets the worker drain on the first signal and exits with code 0, where uvicorn would raise the signal again."""

    def __init__(self, app: FastAPI, worker: Worker, drain_seconds: float) -> None:
        grace = int(drain_seconds + _GRACE_SECONDS)
        config = uvicorn.Config(
            app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=grace
        )
        super().__init__(config)
        self._worker, self._drain_seconds = worker, drain_seconds

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread is sent signals
            return
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, self.stop)
        try:
            yield
        finally:
            for name in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(name)

    def stop(self) -> None:
        """What a signal does; on the event loop."""
        if self.should_exit:
            self.force_exit = True
            return
        log.info("shutting down: %d requests are being finished", self._worker.num_open)
        self._worker.begin_drain()
        asyncio.get_running_loop().call_later(self._drain_seconds, self._worker.cancel_all)
        self.should_exit = True
