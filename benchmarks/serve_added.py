"""What a server adds to its engine's times, measured on the one clock that all processes of a machine share."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.serve_loads import Load


@dataclass
class Added:
    """Seconds that lie between the engine and its clients.

    first_token    from sending a request until the engine has it, and from the end of the step that wrote the first token
                   until the client has it; what lies between, waiting for a step's end included, is the engine's own
    events         from the end of the step that wrote an event's tokens until the client has the event
    num_left_out   requests of which a step wrote no text (special tokens, part of a character): it is not known which event
                   is which step's
    """

    first_token: list[float] = field(default_factory=list)
    events: list[float] = field(default_factory=list)
    num_left_out: int = 0

    def add(self, load: Load, requests: Iterable[dict[str, Any]]) -> None:
        """Requests of a load as the server's `--request-log` has them."""
        logged = {request["seed"]: request for request in requests}
        for seed, sent, events in zip(load.seeds, load.arrivals, load.events, strict=True):
            steps = [ended - load.began for ended, _ in logged[seed]["steps"]]
            if len(steps) != len(events):
                self.num_left_out += 1
                continue
            delays = [event - step for event, step in zip(events, steps, strict=True)]
            self.first_token.append(logged[seed]["arrived"] - load.began - sent + delays[0])
            self.events += delays


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
