"""The server as a process: sockets, signals, a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from dspark.errors import InvalidConfiguration
from dspark.serve.engine_end import SWITCH_SECONDS
from dspark.serve.heads import BoundedHeads

if TYPE_CHECKING:
    from dspark.serve.backend import Backend

log = logging.getLogger(__name__)

_GRACE_SECONDS = 5.0  # for telling clients of requests that were cancelled when draining took too long


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


def serve(app: FastAPI, backend: Backend, listening: socket.socket, drain_seconds: float) -> None:
    """Answer until SIGTERM or Ctrl-C; then finish what was taken, for `drain_seconds` at most. A second signal cancels it.

    Without an engine there is nothing to answer: it ends when that has.
    """
    gc.freeze()  # libraries stay: no collection has to look through them
    sys.setswitchinterval(SWITCH_SECONDS)
    Server(app, backend, drain_seconds).run(sockets=[listening])


class Server(uvicorn.Server):
    """Lets the engine drain on the first signal and exits with code 0, where uvicorn would raise the signal again."""

    def __init__(self, app: FastAPI, backend: Backend, drain_seconds: float) -> None:
        grace = int(drain_seconds + _GRACE_SECONDS)
        config = uvicorn.Config(
            app,
            http=BoundedHeads,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=grace,
        )
        super().__init__(config)
        self._backend, self._drain_seconds = backend, drain_seconds

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
            self._backend.cancel_all()  # its clients are told, where uvicorn would cut them off
            asyncio.get_running_loop().call_later(_GRACE_SECONDS, setattr, self, "force_exit", True)
            return
        log.info("shutting down: %d requests are being finished", self._backend.num_open)
        self._backend.begin_drain()
        asyncio.get_running_loop().call_later(self._drain_seconds, self._backend.cancel_all)
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        is_lost = not (self._backend.is_alive or self._backend.is_draining)
        return await super().on_tick(counter) or is_lost
