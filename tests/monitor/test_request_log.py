from __future__ import annotations

import json

from dspark.monitor.request_log import RequestLog
from dspark.types import RequestRecord, SamplingParams


def test_a_line_says_when_steps_ended_and_no_text(tmp_path) -> None:
    log = RequestLog(tmp_path / "requests.jsonl")
    record = RequestRecord(
        request_id=3,
        params=SamplingParams(),
        seed=7,
        drafter="dspark",
        prompt_token_ids=[101, 102],
        token_ids=[103, 104, 105, 106],
        finish_reason="length",
        rounds=[],
        arrival_seconds=10.0,
        start_seconds=10.5,
        finish_seconds=13.0,
        token_seconds=[11.0, 12.0, 12.0, 13.0],
    )
    log.request(record)
    log.close()
    line = json.loads((tmp_path / "requests.jsonl").read_text())
    assert line.pop("time") > 0
    assert line == {
        "event": "request",
        "seed": 7,
        "finish_reason": "length",
        "num_prompt_tokens": 2,
        "arrived": 10.0,
        "started": 10.5,
        "steps": [[11.0, 1], [12.0, 2], [13.0, 1]],
    }
