"""What a server adds to its engine's times, measured on the one clock that all processes of a machine share."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.serve_loads import Load
from dspark.engine.text import Detokenizer


@dataclass
class Added:
    """Seconds that lie between the engine and its clients.

    first_token    from sending a request until the engine has it, and from the end of the step that wrote the first token
                   until the client has it; what lies between, waiting for a step's end included, is the engine's own
    events         from the end of the step that wrote an event's tokens until the client has the event
    until_socket   the part of it until the event is at the client's socket, where it waits for the client to read
    num_left_out   requests of which it is not known which event is which step's
    """

    first_token: list[float] = field(default_factory=list)
    events: list[float] = field(default_factory=list)
    until_socket: list[float] = field(default_factory=list)
    num_left_out: int = 0

    def add(
        self, load: Load, requests: Iterable[dict[str, Any]], tokens: Mapping[int, list[int]], tokenizer: Any
    ) -> None:
        """Requests of a load as the server's `--request-log` has them, and by seed what they say.

        A step may write no text (special tokens, part of a character), and then there is no event.
        """
        logged = {request["seed"]: request for request in requests}
        times = zip(load.seeds, load.arrivals, load.events, load.at_socket, strict=True)
        for seed, sent, events, at_socket in times:
            steps = [ended - load.began for ended in _with_text(logged[seed]["steps"], tokens[seed], tokenizer)]
            if len(steps) != len(events) or not steps:
                self.num_left_out += 1
                continue
            delays = [event - step for event, step in zip(events, steps, strict=True)]
            self.first_token.append(logged[seed]["arrived"] - load.began - sent + delays[0])
            self.events += delays
            self.until_socket += [came - step for came, step in zip(at_socket, steps, strict=True)]


def _with_text(steps: Iterable[tuple[float, int]], tokens: list[int], tokenizer: Any) -> Iterator[float]:
    """Of steps as they are logged: when those ended that added text."""
    detokenizer, start = Detokenizer(tokenizer), 0
    for ended, num_tokens in steps:
        stop = start + num_tokens
        text = detokenizer.push(tokens[start:stop])
        if text or (stop == len(tokens) and detokenizer.flush()):
            yield ended
        start = stop


class RequestLog:
    """The server's log of requests, whose lines come a moment after clients have their answers."""

    def __init__(self, path: Path) -> None:
        self._path, self._num_seen = path, 0

    def next(self, num_requests: int) -> list[dict[str, Any]]:
        """What the requests after the last look were; waits for it."""
        deadline = time.monotonic() + 10
        while len(lines := self._path.read_text().splitlines()[self._num_seen :]) < num_requests:
            assert time.monotonic() < deadline, f"the server has logged {len(lines)} of {num_requests} requests"
            time.sleep(0.01)
        self._num_seen += num_requests
        return [json.loads(line) for line in lines]
