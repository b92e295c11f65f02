#!/usr/bin/env python
"""What the server costs on top of its engine, and how it compares with `transformers serve`, in one run.

    python benchmarks/serve.py --quick

starts `dspark serve` as users do and talks to it with streaming clients, taking turns with the same engine
in this process, which writes the same text. Closed loop: clients begin one after another, and each asks again up to 0.1 s
after it has its answer; the engine's own speed is that of requests that come in the same way. What the server adds to
the first token and to every event is read off one clock that both ends share: of the server's request log, which says
when requests had arrived at the engine and when its steps ended, and of the client, which notes when bytes come.
Open loop (--rate): requests arrive at random, whether or not earlier ones have ended.
--minutes: the closed loop for so long, and what memory, files and threads of the server's processes do (on Linux); with
--repeats 0 nothing else. --peer needs transformers[serving] and
accelerate; both sides then answer the same requests at temperature 0, up to the target's end token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

# Run as a file, this folder would come first on the path and its modules could shadow others.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import httpx
import torch
import uvloop

from benchmarks import prompts
from benchmarks.measure import leave_alone
from benchmarks.serve_added import Added, RequestLog
from benchmarks.serve_loads import PAUSE_SECONDS, Load, ask_closed, ask_open, closed, greedy, own, sampled
from dspark import Engine, load_drafter, load_target


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--target", default="tiny", help="a name or a folder (default tiny)")
    add("--drafter", default="dspark", help="of both sides (default dspark)")
    add("--scheduler", default="auto", help="of both sides (default auto)")
    add("--dtype", default="float32", choices=["bfloat16", "float32"])
    add("--compile", action="store_true", help="both sides compiled, as users should run them (with --dtype bfloat16)")
    add("--prompts", type=Path, help="a .jsonl file or a folder of them (default: a small set of our own)")
    add("--clients", default="1,8,32", help="closed loop: clients at once (default 1,8,32)")
    add("--requests-per-client", type=int, default=4, help="(default 4)")
    add("--tokens", type=int, default=96, help="new tokens per request (default 96)")
    add("--repeats", type=int, default=3, help="turns that each side takes (default 3)")
    add(
        "--pause",
        type=float,
        default=PAUSE_SECONDS,
        help="clients of --minutes ask again up to so much later, in seconds",
    )
    add("--rate", type=float, help="open loop: requests a second, as well")
    add("--prefix-tokens", type=int, default=0, help="of the server (default 0: turns repeat their prompts)")
    add("--threads", type=int, default=1, help="of each side (default 1)")
    add("--minutes", type=float, help="the closed loop with the most clients for so long, watching memory, as well")
    add("--peer", action="store_true", help="`transformers serve` on the same weights, as well")
    add("--peer-clients", default="1,4,16", help="(default 1,4,16)")
    add("--peer-flags", default="", help="for `transformers serve`, such as =--continuous-batching (default: none)")
    add("--quick", action="store_true", help="one repeat, fewer requests and tokens")
    add("--json", type=Path, metavar="FILE", help="everything, every single time included")
    options = parser.parse_args(arguments)
    if options.quick:
        options.repeats, options.requests_per_client, options.tokens = 1, 2, min(options.tokens, 64)
    return options


# -- servers as processes ---------------------------------------------------------------------------------------------


@contextmanager
def started(command: Sequence[str], port: int, ready: str) -> Iterator[tuple[str, int]]:
    """The URL and the number of a server process, once it answers at `ready`."""
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 600
            while not _answers(url + ready):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    said = log.read().decode(errors="replace").strip().splitlines()[-5:]
                    raise SystemExit("\n".join([*said, f"{' '.join(command)} did not start"]))
                time.sleep(0.2)
            yield url, process.pid
        finally:
            process.terminate()
            process.wait(60)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.HTTPError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# -- the run ----------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    found = prompts.load(options.prompts) if options.prompts else prompts.built_in()
    texts = [prompt.text for prompt in prompts.by_turns(found)]
    target = load_target(options.target, dtype=options.dtype, device="cpu")
    engine = Engine(target, load_drafter(options.drafter, target), options.scheduler, compile=options.compile)
    leave_alone()  # as the server does
    report: dict[str, Any] = {}
    loads: list[Load] = []
    with ExitStack() as stack:
        port = free_port()
        command = [sys.executable, "-m", "dspark", "serve", options.target, "--port", str(port)]
        command += ["--drafter", options.drafter, "--scheduler", options.scheduler, "--dtype", options.dtype]
        command += ["--threads", str(options.threads), "--served-model-name", "ours"]
        command += ["--prefix-tokens", str(options.prefix_tokens), *["--compile"][: options.compile]]
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        command += ["--request-log", str(folder / "requests.jsonl")]
        url, pid = stack.enter_context(started(command, port, "/ready"))
        log = RequestLog(folder / "requests.jsonl")
        for clients in map(int, options.clients.split(",")) if options.repeats else ():
            loads += _beside_engine(engine, url, log, texts, clients, options)
        if options.rate:
            load = Load("server, open loop", 0)
            asked = sampled(_texts(texts, 32 if options.quick else 200), options.tokens)
            uvloop.run(ask_open(url, load, asked, options.rate))
            _print_load(load, f"{options.rate:g} requests/s arriving at random")
            loads.append(load)
        if options.minutes:
            report["memory"] = uvloop.run(_soak(url, pid, texts, options))
        if options.peer:
            loads += _beside_peer(url, texts, options, Path(target.config._name_or_path))
    if options.json:
        report["environment"] = {"python": platform.python_version(), "torch": torch.__version__}
        report |= {"options": vars(options), "loads": [asdict(load) for load in loads]}
        options.json.write_text(json.dumps(report, default=str))
    return 1 if any(load.num_failed for load in loads) else 0


def _beside_engine(
    engine: Engine, url: str, log: RequestLog, texts: Sequence[str], clients: int, options: argparse.Namespace
) -> list[Load]:
    asked, added = _texts(texts, clients * options.requests_per_client), Added()
    sides: tuple[list[Load], list[Load]] = [], []
    for repeat in range(options.repeats + 1):
        cpu = _of_both(httpx.get(url + "/metrics", timeout=60).text, "cpu_seconds_total")
        server = closed("server", url, clients, sampled(asked, options.tokens))
        server.cpu_seconds = _of_both(httpx.get(url + "/metrics", timeout=60).text, "cpu_seconds_total") - cpu
        logged = log.next(len(asked))
        alone = own(engine, asked, clients, options.tokens)
        if repeat:  # the first turn warms both up
            added.add(server, logged, alone.tokens, engine.target.tokenizer)
            sides[0].append(server)
            sides[1].append(alone)
    _print_sides(*sides, added)
    return [*sides[0], *sides[1]]


def _beside_peer(url: str, texts: Sequence[str], options: argparse.Namespace, folder: Path) -> list[Load]:
    port, loads = free_port(), []
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--device", "cpu", "--dtype", options.dtype, *options.peer_flags.split()]
    with started(command, port, "/health") as (peer, _):
        for clients in map(int, options.peer_clients.split(",")):
            asked, sides = _texts(texts, clients * options.requests_per_client), {"server": url, "transformers": peer}
            for repeat in range(options.repeats + 1):
                for side, where in sides.items():
                    model = "ours" if side == "server" else str(folder)
                    load = closed(side, where, clients, greedy(asked, options.tokens, model))
                    loads += [load] if repeat else []
            for side in sides:
                turns = [load for load in loads if (load.side, load.clients) == (side, clients)]
                _print_load(max(turns, key=lambda load: load.speed), f"{clients} clients, best turn")
    return loads


async def _soak(url: str, pid: int, texts: Sequence[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """What the server's processes held, minute by minute, while clients kept asking, never twice the same."""
    clients, began = max(map(int, options.clients.split(","))), time.monotonic()
    load, held = Load("server, long run", clients), list[dict[str, Any]]()

    def requests() -> Iterator[tuple[str, dict[str, Any]]]:
        for seed in count():
            if time.monotonic() - began > 60 * options.minutes:
                return
            text = f"{seed}. {texts[seed % len(texts)]}"
            yield text, {"temperature": 1, "seed": seed, "max_tokens": options.tokens, "ignore_eos": True}

    asking = asyncio.ensure_future(ask_closed(url, load, requests(), options.pause))
    while not asking.done():
        await asyncio.wait([asking], timeout=60)
        held.append({"minutes": (time.monotonic() - began) / 60, "num_requests": len(load.events)} | held_by(pid))
        shown = "; ".join(
            f"{name} {size / 2**20:.1f} MiB, {files} files, {threads} threads"
            for name in ("front", "engine")
            for size, files, threads in [held[-1][name]]
        )
        print(f"{held[-1]['minutes']:6.1f} minutes, {len(load.events)} requests: {shown}", flush=True)
    await asking
    _print_load(load, f"{options.minutes:g} minutes with {clients} clients")
    return held


def held_by(pid: int) -> dict[str, tuple[int, int, int]]:
    """Resident bytes, open files and threads of a server's two processes."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()  # Python's resource tracker is one of them
    return {"front": _held(str(pid)), "engine": max(map(_held, children))}


def _held(pid: str) -> tuple[int, int, int]:
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    status = {line[0]: line[1] for line in lines if len(line) > 1}
    return int(status["VmRSS:"]) * 1024, len(list(Path(f"/proc/{pid}/fd").iterdir())), int(status["Threads:"])


def _of_both(page: str, name: str) -> float:
    """Added up over the server's processes: the engine's and the one in front of it."""
    names = (f"process_{name}", f"dspark_front_process_{name}")
    return sum(float(line.split()[1]) for line in page.splitlines() if line.startswith(names))


def _texts(texts: Sequence[str], count: int) -> list[str]:
    return [texts[i % len(texts)] for i in range(count)]


def _print_sides(server: Sequence[Load], engine: Sequence[Load], added: Added) -> None:
    share = statistics.median(s.speed / e.speed for s, e in zip(server, engine, strict=True))
    speed, own_speed = (statistics.median(load.speed for load in side) for side in (server, engine))
    first = statistics.median(x for load in server for x in load.first_token)
    cpu, own_cpu = (statistics.median(x.cpu_seconds / x.num_tokens for x in side) for side in (server, engine))
    client = statistics.median(load.client_seconds / sum(map(len, load.events)) for load in server)
    print(
        f"{server[0].clients:3d} clients: server {speed:6.0f} tokens/s, {100 * share:.0f} % of the engine's {own_speed:.0f}; "
        f"first token {1000 * first:.1f} ms, of which the server's {_spread(added.first_token)}; "
        f"added to an event {_spread(added.events)}, of which until it is at the client's socket "
        f"{_spread(added.until_socket)}; processor time per token {1000 * cpu:.2f} ms, "
        f"{100 * (cpu / own_cpu - 1):+.0f} %, and {1000 * client:.2f} ms of the clients per event"
        + (
            f"; {added.num_left_out} requests of {sum(len(s.events) for s in server)} left out"
            if added.num_left_out
            else ""
        ),
        flush=True,
    )


def _spread(seconds: Sequence[float]) -> str:
    ordered = sorted(seconds)
    return f"{1000 * statistics.median(ordered):.2f} ms (95 % within {1000 * ordered[-1 - len(ordered) // 20]:.2f})"


def _print_load(load: Load, note: str) -> None:
    first = sorted(load.first_token)
    print(
        f"{load.side}, {note}: {load.speed:.0f} tokens/s, first token median "
        f"{1000 * statistics.median(first):.0f} ms, 95 % within {1000 * first[-1 - len(first) // 20]:.0f} ms",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
