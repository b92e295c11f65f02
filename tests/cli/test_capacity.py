"""`dspark capacity`: plans from files and from a server, demand, and what it refuses."""

from __future__ import annotations

import json
import math
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dspark.budget.capacity import Capacity
from tests.cli.command import is_one_line_error, run, run_json

MIX = ("--prompt-tokens", "80", "--output-tokens", "60", "--tau", "2")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    capacity = Capacity({"hardware": "a test", "target": "t", "dtype": "float32"})
    for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        for _ in range(9):
            capacity.decoding.observe(tokens, min(tokens, 32), 100 * min(tokens, 32), 0.01 + 0.0005 * tokens)
            capacity.reading.observe(tokens, min(tokens, 32), 0, 0.01 + 0.0005 * tokens)
    path = tmp_path_factory.mktemp("capacity") / "capacity.json"
    capacity.save(path)
    return str(path)


@pytest.fixture
def rates(tmp_path):
    path = tmp_path / "rates.txt"
    path.write_text("\n".join(f"{30 + 20 * math.sin(2 * math.pi * h / 24)}" for h in range(24 * 6)))
    return path


def test_a_plan_from_numbers(capsys, file):
    code, out, err = run(capsys, "capacity", file, *MIX)
    assert code == 0, err
    assert "one server takes" in out and "the queue grows" in out
    plan = run_json(capsys, "capacity", file, *MIX)["plan"]
    assert f"one server takes {plan['highest_rate']:.3g} requests/s" in out
    tighter = run_json(capsys, "capacity", file, *MIX, "--slo-per-token", "0.012")["plan"]
    assert tighter["highest_rate"] < plan["highest_rate"] and tighter["limited_by"] == "per_token"


def test_objectives_that_nobody_keeps(capsys, file):
    code, out, _ = run(capsys, "capacity", file, *MIX, "--slo-ttft", "0.001")
    assert code == 0 and "no rate keeps" in out and "first tokens" in out


def test_servers_for_tomorrow(capsys, file, rates):
    result = run_json(capsys, "capacity", file, *MIX, "--rates", str(rates), "--num-slots", "1000")
    plan, demand = result["plan"], result["demand"]
    assert max(demand["median"]) == pytest.approx(50, rel=0.01)
    assert demand["servers"] == [math.ceil(rate / plan["highest_rate"]) for rate in demand["upper"]]
    first = next(h for h, rate in enumerate(demand["upper"]) if rate >= plan["kv_full_rate"])
    assert demand["kv_full_in_hours"] == first
    code, out, _ = run(capsys, "capacity", file, *MIX, "--rates", str(rates), "--num-slots", "1000")
    assert code == 0 and f"servers: {max(demand['servers'])} for the quantile" in out and "runs out in" in out


def test_the_rate_of_the_last_days_from_prometheus_with_a_gap(capsys, file):
    values = [[3600 * h, str(3 + math.sin(2 * math.pi * h / 24))] for h in range(24 * 6) if h != 50]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            assert self.path.startswith("/api/v1/query_range?query=")
            self.wfile.write(json.dumps({"data": {"result": [{"values": values}]}}).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        demand = run_json(capsys, "capacity", file, *MIX, "--prometheus", f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
    assert demand["demand"]["median"][6] == pytest.approx(4.0, rel=0.01)  # in phase in spite of the gap


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("{file}",), "no --metrics"),
        (("{file}", *MIX, "--share", "1.5"), "between 0 and 1"),
        (("{file}", *MIX, "--slo-ttft", "0"), "--slo-ttft"),
        (("{file}", *MIX, "--max-num-seqs", "0"), "--max-num-seqs"),
        (("{file}", *MIX[:4], "--tau", "0.5"), "tau"),
        (("{file}", "--verified", "2", *MIX[:4]), "--tau"),
        (("{file}", *MIX[:4], "--tau", "3", "--verified", "1.5"), "--verified must be so many"),
        (("{file}", *MIX, "--metrics", "http://127.0.0.1:9/metrics"), "cannot read"),
        (("{file}", *MIX, "--metrics", "{file}"), "no page of metrics"),
        (("{file}", *MIX, "--rates", "nowhere.txt"), "cannot read"),
        (("{file}", *MIX, "--rates", "{file}"), "hourly rates"),
        (("nowhere.json", *MIX), "capacity file"),
    ],
)
def test_mistakes_are_one_line(capsys, file, arguments, why):
    code, _, err = run(capsys, "capacity", *(a.format(file=file) for a in arguments))
    assert code == 2 and is_one_line_error(err) and why in err, err


def test_without_the_packages_of_a_server_it_says_what_to_install(monkeypatch, capsys, tmp_path):
    for name in [name for name in sys.modules if name.startswith("dspark.monitor.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    code, _, err = run(capsys, "capacity", str(tmp_path / "capacity.json"))
    assert code == 2 and 'pip install "dspark[serve]"' in err and is_one_line_error(err)
