"""What the server's process and the engine's say to each other: a name and arguments, pickled, with their length before them.

Both ends are this package, started by each other: nobody else can write to the line.
"""

from __future__ import annotations

import pickle
import select
import socket
from collections.abc import Iterator
from typing import Any

Message = tuple[Any, ...]  # (name, *arguments)

_LENGTH_BYTES, _MOST_AT_ONCE = 8, 2**18


def packed(message: Message) -> bytes:
    """A message as it goes over the line."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


class Unpacker:
    """Messages out of pieces that end anywhere."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that are whole with these bytes."""
        self._buffer += data
        while len(self._buffer) >= _LENGTH_BYTES:
            end = _LENGTH_BYTES + int.from_bytes(self._buffer[:_LENGTH_BYTES], "big")
            if len(self._buffer) < end:
                return
            message: Message = pickle.loads(self._buffer[_LENGTH_BYTES:end])
            del self._buffer[:end]
            yield message


def received(line: socket.socket) -> Iterator[Message]:
    """Messages as they come, waiting for each, until the other end is closed or its process has ended."""
    unpacker, waiting = Unpacker(), select.poll()
    waiting.register(line, select.POLLIN)
    while True:
        waiting.poll()  # a line that something is sent over does not block: see `Relay`
        try:
            data = line.recv(_MOST_AT_ONCE)
        except ConnectionError:
            return
        if not data:
            return
        yield from unpacker.feed(data)
