"""What is sent comes whole and in order, whoever is slow, and nobody who sends waits."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from dspark.serve.relay import Relay


@pytest.fixture(params=["by the kernel", "by hand"])
def line(request, monkeypatch) -> Iterator[tuple[socket.socket, socket.socket]]:
    if request.param == "by hand":

        def refusing(*_: object) -> int:
            raise OSError("a pipe and a socket: not here")

        monkeypatch.setattr(os, "splice", refusing, raising=False)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(10)
        yield ours, theirs


def read(ours: socket.socket) -> bytes:
    """Everything until the other end is closed."""
    return b"".join(iter(lambda: ours.recv(2**16), b""))


def test_much_more_than_fits_waits_for_its_reader_and_not_for_its_sender(line) -> None:
    ours, theirs = line
    pieces = [bytes([n % 251]) * size for n, size in enumerate([1, 5000, 2**20, 10, 0, 70_000] * 3)]
    relay = Relay(theirs)
    for piece in pieces[:3]:
        relay.send(piece)
    time.sleep(0.1)  # nobody reads yet: what fits into the line is in it
    sending = threading.Thread(target=lambda: [relay.send(piece) for piece in pieces[3:]])
    sending.start()
    sending.join(10)
    has_waited = sending.is_alive()  # it may do so in the kernel, where no signal reaches it
    closing = threading.Thread(target=lambda: (relay.close(), theirs.close()))
    closing.start()
    assert read(ours) == b"".join(pieces)
    closing.join(10)
    assert not closing.is_alive()
    assert not has_waited


def test_pieces_of_many_threads_stay_whole(line) -> None:
    ours, theirs = line
    relay = Relay(theirs)

    def send(name: int) -> None:
        for _ in range(50):
            relay.send(bytes([name]) * 3001)

    threads = [threading.Thread(target=send, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    data = b""
    while len(data) < 4 * 50 * 3001:
        data += ours.recv(2**16)
    for thread in threads:
        thread.join()
    relay.close()
    pieces = [data[start : start + 3001] for start in range(0, len(data), 3001)]
    assert sorted(pieces) == [bytes([name]) * 3001 for name in range(4) for _ in range(50)]


def test_without_a_reader_nothing_is_kept_and_nothing_stays_open(line) -> None:
    ours, theirs = line
    before = set(os.listdir("/dev/fd"))
    relay = Relay(theirs)
    relay.send(bytes(2**20))
    ours.close()
    deadline = time.monotonic() + 10
    while relay._thread.is_alive() and time.monotonic() < deadline:
        relay.send(bytes(2**16))
        time.sleep(0.001)
    relay.send(b"dropped")
    relay.close()
    assert len(relay._behind) == 0
    assert len(set(os.listdir("/dev/fd")) - before) == 0


def test_an_empty_relay_closes_at_once(line) -> None:
    ours, theirs = line
    relay = Relay(theirs)
    relay.send(b"")
    relay.close()
    relay.close()
    theirs.close()
    assert read(ours) == b""
