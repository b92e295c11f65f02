"""The page needs nothing but itself, its events are well formed, and its numbers are those of /metrics."""

from __future__ import annotations

import json
import re
from importlib.resources import files

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from dspark.engine.engine import Engine
from dspark.monitor.canaries import Outcome
from dspark.monitor.identity import Difference
from dspark.monitor.monitoring import Monitoring
from dspark.monitor.snapshot import percentile
from dspark.serve.dashboard import make_dashboard
from dspark.types import SamplingParams
from engine.models import OracleDrafter, random_target
from monitor.records import finished, step
from monitor.test_prometheus import values

PAGE = files("dspark.serve").joinpath("dashboard.html").read_text(encoding="utf-8")


def monitoring(**options) -> Monitoring:
    return Monitoring("tiny", "oracle", 100, process=False, **options)


def client(m: Monitoring, **options) -> TestClient:
    app = FastAPI()

    async def source():
        return m.snapshot()

    app.include_router(make_dashboard(source, **options))
    return TestClient(app)


def test_the_page_loads_nothing_from_elsewhere():
    answer = client(monitoring()).get("/dashboard")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.findall(r"https?://|//[a-z]|@import|<link|<img|\bsrc=|url\(|import\(", answer.text)
    assert re.findall(r'fetch\("([^"]+)"', answer.text) == ["dashboard/events"]


def test_the_page_asks_only_for_what_a_snapshot_has():
    """A name that the page reads and the snapshot lacks would show up as a dash for ever."""
    m = monitoring(cost=lambda tokens, requests, context: 0.01)
    m.step(step(confidence=[[0.9] * 7], predicted_seconds=0.05))
    snapshot = m.snapshot()
    for letter, part in (("n", "now"), ("r", "rates"), ("c", "canaries"), ("t", "totals")):
        asked = set(re.findall(rf"(?<![\w.$]){letter}\.([a-z_0-9]+)", PAGE))
        assert asked and asked <= set(snapshot[part]), part
    assert set(re.findall(r"(?<![\w.])s\.([a-z_]+)", PAGE)) - {"capacity", "points", "bars", "kind", "dots"} <= set(
        snapshot
    )


def test_events_are_server_sent_json_without_nan():
    m = monitoring()
    with client(m).stream("GET", "/dashboard/events", params={"once": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        body = "".join(answer.iter_text())
    (event,) = body.split("\n\n")[:-1]
    assert body.endswith("\n\n") and event.startswith("data: ") and "\n" not in event
    snapshot = json.loads(event.removeprefix("data: "), parse_constant=lambda name: pytest.fail(name))
    assert snapshot["rates"]["tau"] is None and snapshot["acceptance"] == [] and snapshot["alerts"] == []


def test_the_stream_goes_on_and_ends_when_the_server_does():
    asked = iter([False, False, False, True])
    answer = client(monitoring(), interval_seconds=0.0, is_ending=lambda: next(asked)).get("/dashboard/events")
    assert answer.text.count("data: ") == 3


def test_numbers_are_those_of_metrics(tmp_path):
    target = random_target(tmp_path)
    prompts, params = [[3, 1, 4], [1, 5, 9]], SamplingParams(temperature=0, max_tokens=40)
    texts = [p + g.token_ids for p, g in zip(prompts, Engine(target).generate(prompts, params), strict=True)]
    m = monitoring()
    Engine(target, OracleDrafter(texts, error=0.2), "fixed:5", observers=[m.step]).generate(prompts, params)
    for seconds in (101.5, 102.0, 109.0):
        m.request(finished(token_seconds=[101.0, seconds]))
    m.metrics.prefix_hits.add(1, 4)
    s, v = m.snapshot(), values(m.metrics)
    assert s["totals"]["accepted_tokens"] == v["vllm:spec_decode_num_accepted_tokens_total"] > 0
    assert s["totals"]["drafts"] == v["vllm:spec_decode_num_drafts_total"]
    assert s["totals"]["requests"] == v["dspark_requests_finished_total.stop"] == 3
    assert s["rates"]["tau"] == v["dspark_committed_tokens_total"] / v["dspark_decode_passes_total"]
    assert s["now"]["kv_usage"] == v["dspark_kv_usage_ratio"]
    assert s["now"]["prefix_hits"] == v["dspark_prefix_hit_ratio"] == 0.25
    for row in s["acceptance"]:
        reached = v[f"dspark_reached_tokens_per_pos_total.{row['position'] - 1}"]
        assert row["rate"] == v[f"vllm:spec_decode_num_accepted_tokens_per_pos_total.{row['position'] - 1}"] / reached
    assert s["budget"][-1]["verified"] == v["dspark_load_verified_tokens_total.2"] / v["dspark_load_passes_total.2"]
    assert s["latency"]["e2e"]["p50"] == pytest.approx(2.125)  # 3/4 of the two in the bucket 1 .. 2.5
    assert sum(s["phases"].values()) == pytest.approx(1.0)


def test_rates_are_over_the_last_minute():
    now = [0.0]
    m = monitoring()
    m.snapshot._clock, m.snapshot._began = lambda: now[0], 0.0
    m.snapshot._samples[0] = (0.0, {})
    for second in range(1, 200):
        now[0] = float(second)
        for _ in range(1 if second < 100 else 3):
            m.step(step(verified=(5,), accepted=(3,)))
        snapshot = m.snapshot()
        if second == 90:
            assert snapshot["rates"]["tokens_per_second"] == pytest.approx(4.0)
    assert snapshot["rates"]["tokens_per_second"] == pytest.approx(12.0)
    assert 60 <= snapshot["window_seconds"] <= 62 and len(snapshot["history"]) == 120


def test_percentiles_are_prometheus_own():
    buckets = {"h_bucket|1.0": 10.0, "h_bucket|2.0": 30.0, "h_bucket|4.0": 40.0, "h_bucket|+Inf": 40.0}
    assert percentile(buckets, "h", 0.5) == 1.5 and percentile(buckets, "h", 0.99) == pytest.approx(3.92)
    assert percentile({**buckets, "h_bucket|+Inf": 80.0}, "h", 0.99) == 4.0


def test_a_little_evidence_raises_no_alert():
    m = monitoring()
    for _ in range(3):
        m.step(step(drafted=(0,), verified=(0,), accepted=(0,), seconds=0.01))  # what plain decoding takes
    alerts = []
    for _ in range(250):
        m.step(step(verified=(7,), accepted=(0,), seconds=0.2, confidence=[0.9] * 7))
        alerts.append({a["name"] for a in m.snapshot()["alerts"]})
    assert alerts[0] == set() and alerts[-1] == {"SpeculationHurts"}
    for _ in range(800):
        m.step(step(verified=(7,), accepted=(0,), seconds=0.2, confidence=[0.9] * 7))
    assert {a["name"] for a in m.snapshot()["alerts"]} == {"SpeculationHurts", "CalibrationDrift"}


def test_alerts_and_events_without_tokens():
    m = monitoring()
    m.step(step(num_free_slots=1))
    m.metrics.canary(outcome := Outcome("unexplained", finished(), [9], Difference(0, 4, 9)))
    m._replayed(outcome)
    s = m.snapshot()
    assert [a["name"] for a in s["alerts"]] == ["CanaryMismatch", "KvSaturation"]
    assert s["events"][0]["outcome"] == "unexplained" and not any("token" in key for key in s["events"][0])
