"""When each request came and when each of its steps ended, for whoever looks into latency afterwards. No text."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from dspark.monitor.events import EventLog
from dspark.types import RequestRecord


class RequestLog:
    """Observer of finished requests: one JSON line each, in a file that is rotated once it is large.

    Times are seconds on the clock that all processes of a machine share (Linux: CLOCK_MONOTONIC, Python's
    `time.monotonic()`), so a client on the same machine can tell what lies between it and the engine:
    `arrived` when the engine had the request, `started` when its first step began, `steps` as [when it ended, tokens].
    """

    def __init__(self, path: str | Path) -> None:
        self._file = EventLog(path, num_recent=0)

    def request(self, record: RequestRecord) -> None:
        self._file.write(
            "request",
            seed=record.seed,
            finish_reason=record.finish_reason,
            num_prompt_tokens=len(record.prompt_token_ids),
            arrived=record.arrival_seconds,
            started=record.start_seconds,
            steps=[[ended, len(list(tokens))] for ended, tokens in groupby(record.token_seconds)],
        )

    def close(self) -> None:
        self._file.close()
