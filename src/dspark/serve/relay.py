"""Bytes for a socket, from threads that wait neither for who reads them nor for who writes them."""

from __future__ import annotations

import os
import select
import socket
import threading
from contextlib import suppress

_MOST_AT_ONCE = 2**16


class Relay:
    """Takes bytes from any thread and writes them to `line` in that order; what comes after it has ended is dropped.

    They go through a pipe, out of which a thread has the kernel move them into the socket. That thread needs no
    interpreter to wake, to move and to write, so nothing waits until another gives it up. And it sleeps again at once: who
    wakes a process that reads may have to leave it its core for a millisecond, which should not be the engine's thread.

    `line` is made non-blocking: the kernel holds on to the pipe while it waits for room in a socket that is not, and then
    who writes into the pipe waits, too.
    """

    def __init__(self, line: socket.socket) -> None:
        line.setblocking(False)
        self._line, self._lock = line, threading.Lock()
        self._outlet, self._inlet = os.pipe()
        os.set_blocking(self._inlet, False)
        self._behind = bytearray()  # what the pipe has no room for; while there is any, the pipe is not empty
        self._is_closing = self._has_ended = False
        self._thread = threading.Thread(target=self._carry_all, name="dspark-sending", daemon=True)
        self._thread.start()

    def send(self, data: bytes) -> None:
        """Returns at once."""
        with self._lock:
            if not self._is_closing:
                self._behind += data
                self._fill()

    def close(self) -> None:
        """Take nothing more; waits until what has been taken is written, or cannot be."""
        with self._lock:
            self._is_closing = True
            self._fill()
        self._thread.join()

    def _fill(self) -> None:
        """Under the lock."""
        if self._has_ended:
            return
        if self._behind:
            with suppress(BlockingIOError):
                del self._behind[: os.write(self._inlet, self._behind)]
        if self._is_closing and not self._behind:
            self._has_ended = True
            os.close(self._inlet)  # the thread gets what is in the pipe, and then nothing

    def _carry_all(self) -> None:
        with suppress(ConnectionError):  # nobody reads any more: whoever reads from the line notices, too
            while _carried(self._outlet, self._line):
                with self._lock:
                    self._fill()
        with self._lock:
            self._is_closing = True
            self._behind.clear()
            self._fill()
        os.close(self._outlet)


def _carried(outlet: int, line: socket.socket) -> int:
    """How many bytes a write has moved, for which it waits; 0: none will follow."""
    while True:
        try:
            return os.splice(outlet, line.fileno(), _MOST_AT_ONCE)
        except BlockingIOError:
            _wait_for_room(line)
        except ConnectionError:
            raise
        except (AttributeError, OSError):  # a system that cannot
            return _carried_by_hand(outlet, line)


def _carried_by_hand(outlet: int, line: socket.socket) -> int:
    data = os.read(outlet, _MOST_AT_ONCE)
    left = memoryview(data)
    while left:
        _wait_for_room(line)
        left = left[line.send(left) :]
    return len(data)


def _wait_for_room(line: socket.socket) -> None:
    waiting = select.poll()
    waiting.register(line, select.POLLOUT)
    waiting.poll()
