"""Run the alert rules against a real Prometheus and Alertmanager: inject every fault, see its alert fire, see it clear.

    python monitoring/exercise.py            needs `prometheus` and `prometheus-alertmanager` (Debian's packages)

A small server behind our own metrics plays DSpark under load. Time in the rules is divided by --faster, so that hours
pass in minutes; nothing else of them is changed. Exit code 1: an alert did not come, did not go, or came uncalled.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import socket
from typing import Any

import torch

from dspark.monitor.canaries import Outcome
from dspark.monitor.monitoring import Monitoring
from dspark.types import Load, RequestRecord, Round, SamplingParams, StepRecord

HERE = Path(__file__).parent
_DURATION = re.compile(r"(?<=[\[ ])(\d+)([smhd])(?=\]|\n|$)", re.MULTILINE)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_TICK_SECONDS = 0.05
_LENGTH = 5


@dataclass(frozen=True)
class Behaviour:
    """How the played server behaves: healthy, unless told otherwise."""

    acceptance: float = 0.75
    confidence: float = 0.75
    step_seconds: float = 0.05
    ttft: float = 0.2
    canary: str = "equal"
    num_faults: int = 0
    kv_per_second: float = 0.0
    is_up: bool = True


HEALTHY = Behaviour()


@dataclass(frozen=True)
class Fault:
    """What is done to the server, the alerts that must come, and those that may come with them."""

    name: str
    behaviour: Behaviour
    expected: frozenset[str]
    also: frozenset[str] = frozenset()


def _fault(name: str, expected: str, also: str = "", **changes: Any) -> Fault:
    names = (frozenset(f"DSpark{n}" for n in text.split()) for text in (expected, also))
    return Fault(name, replace(HEALTHY, **changes), *names)


FAULTS = (
    _fault("corrupted output", "CanaryMismatch", canary="unexplained"),
    _fault(
        "another drafter swapped in", "AcceptanceDrop Drift", acceptance=0.3, confidence=0.3, also="SpeculationHurts"
    ),
    _fault("confidences no longer true", "CalibrationDrift", confidence=0.9),
    _fault("drafting too slow", "SpeculationHurts", step_seconds=0.2),
    _fault("drafter raises", "DrafterFails", num_faults=1),
    _fault("first tokens too late", "SloBurnFast SloBurnSlow", ttft=3.0),
    _fault("long contexts pile up", "KvSaturationAhead", kv_per_second=0.004),
    _fault("server gone", "ScrapeGone", is_up=False),
)


class Player:
    """Observations as a healthy or faulty server makes them, many times a second, on a thread of its own."""

    def __init__(self) -> None:
        self.behaviour = HEALTHY
        self.monitoring = Monitoring("played", "dspark", 100_000, process=False)
        self._random, self._kv, self._ended = random.Random(0), 0.4, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._num = 0

    def __enter__(self) -> Player:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(_TICK_SECONDS):
            self._tick(self.behaviour)

    def _tick(self, now: Behaviour) -> None:
        self._num += 1
        self._kv = 0.4 if not now.kv_per_second else min(1.0, max(self._kv, 0.5) + now.kv_per_second * _TICK_SECONDS)
        num_requests = 8
        accepted = [self._accepted(now.acceptance) for _ in range(num_requests)]
        self.monitoring.step(self._step(accepted, now))
        if self._num % 20 == 0:  # a plain step now and then, as the guard takes one
            self.monitoring.step(self._step([0] * num_requests, replace(now, step_seconds=0.04), is_plain=True))
        for hits in accepted:
            self.monitoring.request(self._request(hits, now))
        if self._num % 10 == 0:
            self.monitoring.metrics.canary(Outcome(now.canary, self._request(0, now), []))  # type: ignore[arg-type]

    def _accepted(self, chance: float) -> int:
        hits = 0
        while hits < _LENGTH and self._random.random() < chance:
            hits += 1
        return hits

    def _step(self, accepted: list[int], now: Behaviour, is_plain: bool = False) -> StepRecord:
        length = 0 if is_plain else _LENGTH
        positions = torch.arange(length)[None].expand(len(accepted), length)
        return StepRecord(
            request_ids=list(range(len(accepted))),
            drafted=[length] * len(accepted),
            verified=[length] * len(accepted),
            accepted=accepted,
            survival=(now.confidence ** torch.arange(1.0, length + 1)).expand(len(accepted), length),
            kept=positions >= 0,
            accepted_nodes=positions < torch.tensor(accepted)[:, None],
            load=Load(len(accepted), len(accepted)),
            num_faults=now.num_faults if self._num % 20 == 0 else 0,
            num_tokens=len(accepted) * (1 + length),
            num_running=len(accepted),
            num_free_slots=round((1 - self._kv) * self.monitoring.metrics.num_slots),
            seconds={"target": now.step_seconds},
        )

    def _request(self, hits: int, now: Behaviour) -> RequestRecord:
        first = 1 + now.ttft
        return RequestRecord(
            request_id=self._num,
            params=SamplingParams(temperature=0),
            seed=0,
            drafter="dspark",
            prompt_token_ids=[1],
            token_ids=[2] * (1 + hits),
            finish_reason="stop",
            rounds=[Round(_LENGTH, _LENGTH, hits)],
            arrival_seconds=1.0,
            start_seconds=1.0,
            finish_seconds=first + 0.05,
            token_seconds=[first] + [first + 0.05] * hits,
        )


@contextmanager
def exporter(player: Player) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if player.behaviour.is_up else 503)
            self.end_headers()
            self.wfile.write(player.monitoring.metrics.render())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()


def faster(rules: str, factor: float) -> str:
    """The same rules with every duration divided; thresholds on counts per window too, so that they mean the same."""

    def shortened(match: re.Match[str]) -> str:
        return f"{max(1000, round(1000 * int(match[1]) * _SECONDS[match[2]] / factor))}ms"

    text = _DURATION.sub(shortened, rules)
    text = text.replace(", 3600) >", f", {3600 / factor:g}) >")
    return re.sub(r"> (200|1000)$", lambda m: f"> {int(m[1]) / factor:g}", text, flags=re.MULTILINE)


@contextmanager
def started(*command: str, log: Path) -> Iterator[None]:
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        try:
            yield
        finally:
            process.terminate()
            process.wait(20)


@contextmanager
def watched(port: int, factor: float, folder: Path) -> Iterator[tuple[str, str]]:
    """Prometheus and Alertmanager on loopback: their addresses."""
    prometheus, alertmanager = free_port(), free_port()
    (folder / "rules.yml").write_text(faster((HERE / "prometheus/rules.yml").read_text(), factor))
    config = (HERE / "prometheus/prometheus.yml").read_text()
    config = config.replace("5s", "500ms").replace("15s", "1s")
    config = config.replace("dspark:8000", f"127.0.0.1:{port}").replace(
        "alertmanager:9093", f"127.0.0.1:{alertmanager}"
    )
    (folder / "prometheus.yml").write_text(config)
    route = (HERE / "alertmanager/alertmanager.yml").read_text()
    (folder / "alertmanager.yml").write_text(re.sub(r"(group_\w+): \d+[sm]", r"\1: 1s", route))
    with (
        started(
            program("prometheus-alertmanager", "alertmanager"),
            f"--config.file={folder}/alertmanager.yml",
            f"--storage.path={folder}/alertmanager",
            f"--web.listen-address=127.0.0.1:{alertmanager}",
            "--cluster.listen-address=",
            log=folder / "alertmanager.log",
        ),
        started(
            program("prometheus"),
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{prometheus}",
            log=folder / "prometheus.log",
        ),
    ):
        yield f"http://127.0.0.1:{prometheus}", f"http://127.0.0.1:{alertmanager}"


def program(*names: str) -> str:
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        sys.exit(f"{names[0]} is not installed: apt-get install prometheus prometheus-alertmanager")
    return found


def free_port() -> int:
    with socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def fetched(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return json.load(answer)


def firing(prometheus: str) -> set[str]:
    alerts = fetched(f"{prometheus}/api/v1/alerts")["data"]["alerts"]
    return {a["labels"]["alertname"] for a in alerts if a["state"] == "firing"}


def received(alertmanager: str) -> set[str]:
    """What Alertmanager has, whether it tells or holds it back for another alert."""
    return {a["labels"]["alertname"] for a in fetched(f"{alertmanager}/api/v2/alerts?active=true&inhibited=true")}


def wait_until(holds: Any, seconds: float) -> float | None:
    """Seconds until it held, or None."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        if holds():
            return time.monotonic() - began
        time.sleep(0.5)
    return None


def is_ready(prometheus: str, alertmanager: str) -> bool:
    """Both answer, and the server has been scraped: until then its absence is a true alarm."""
    try:
        scraped = fetched(f"{prometheus}/api/v1/query?query=up==1")["data"]["result"]
        return bool(scraped and fetched(f"{alertmanager}/api/v2/status")) and not firing(prometheus)
    except OSError:
        return False


def exercise(fault: Fault, player: Player, prometheus: str, alertmanager: str, patience: float) -> bool:
    player.behaviour = fault.behaviour
    seen: set[str] = set()

    def has_fired() -> bool:
        seen.update(firing(prometheus))
        return fault.expected <= seen and fault.expected <= received(alertmanager)

    to_fire = wait_until(has_fired, patience)
    player.behaviour = HEALTHY
    to_clear = wait_until(lambda: not firing(prometheus) and not received(alertmanager), patience)
    uncalled = seen - fault.expected - fault.also
    is_well = to_fire is not None and to_clear is not None and not uncalled
    shown = [f"{'never' if t is None else f'after {t:.0f} s'}" for t in (to_fire, to_clear)]
    names = ", ".join(sorted(fault.expected))
    print(f"{'ok  ' if is_well else 'FAIL'} {fault.name}: {names} fired {shown[0]}, cleared {shown[1]}", flush=True)
    if uncalled:
        print(f"     uncalled: {', '.join(sorted(uncalled))}")
    return is_well


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faster", type=float, default=60.0, help="how much time is compressed (default 60)")
    parser.add_argument("--clean", type=float, default=60.0, help="seconds without a fault at first (default 60)")
    parser.add_argument("--patience", type=float, default=200.0, help="seconds to wait for each change (default 200)")
    parser.add_argument("--only", help="faults whose name holds this")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started ends with us
    with (
        tempfile.TemporaryDirectory() as folder,
        Player() as player,
        exporter(player) as port,
        watched(port, args.faster, Path(folder)) as (prometheus, alertmanager),
    ):
        if wait_until(lambda: is_ready(prometheus, alertmanager), 60) is None:
            sys.exit("Prometheus did not start:\n" + (Path(folder) / "prometheus.log").read_text()[-2000:])
        early = wait_until(lambda: firing(prometheus), args.clean)
        print(f"{'ok  ' if early is None else 'FAIL'} {args.clean:g} s without a fault: no alert", flush=True)
        well = [early is None]
        for fault in FAULTS:
            if not args.only or args.only in fault.name:
                well.append(exercise(fault, player, prometheus, alertmanager, args.patience))
    print(f"{sum(well)} of {len(well)} as expected, time {args.faster:g} times faster")
    return 0 if all(well) else 1


if __name__ == "__main__":
    sys.exit(main())
