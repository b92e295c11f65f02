#!/usr/bin/env python
"""What the server costs on top of its engine, and how it compares with `transformers serve`, in one run.

    python benchmarks/serve.py --quick

starts `dspark serve` as users do and talks to it with streaming clients, taking turns with the same engine
in this process, which writes the same text. Closed loop: clients begin one after another, and each asks again up to 0.1 s
after it has its answer; the engine's own speed is that of requests that come in the same way. What the server adds to
the first token and between events is against an engine whose requests come when the server's did: who comes while a step
runs waits for its end on both sides.
Open loop (--rate): requests arrive at random, whether or not earlier ones have ended.
--minutes: the closed loop for so long, and what the server's memory does. --peer needs transformers[serving] and
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
from benchmarks.serve_loads import Load, ask_closed, ask_open, closed, greedy, own, sampled
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
def started(command: Sequence[str], port: int, ready: str) -> Iterator[str]:
    """The URL of a server process, once it answers at `ready`."""
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
            yield url
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
        url = stack.enter_context(started(command, port, "/ready"))
        for clients in map(int, options.clients.split(",")):
            loads += _beside_engine(engine, url, texts, clients, options)
        if options.rate:
            load = Load("server, open loop", 0)
            asked = sampled(_texts(texts, 32 if options.quick else 200), options.tokens)
            uvloop.run(ask_open(url, load, asked, options.rate))
            _print_load(load, f"{options.rate:g} requests/s arriving at random")
            loads.append(load)
        if options.minutes:
            report["memory"] = uvloop.run(_soak(url, texts, options))
        if options.peer:
            loads += _beside_peer(url, texts, options, Path(target.config._name_or_path))
    if options.json:
        report["environment"] = {"python": platform.python_version(), "torch": torch.__version__}
        report |= {"options": vars(options), "loads": [asdict(load) for load in loads]}
        options.json.write_text(json.dumps(report, default=str))
    return 1 if any(load.num_failed for load in loads) else 0


def _beside_engine(
    engine: Engine, url: str, texts: Sequence[str], clients: int, options: argparse.Namespace
) -> list[Load]:
    asked, loads = _texts(texts, clients * options.requests_per_client), []
    for repeat in range(options.repeats + 1):
        cpu = _of_both(httpx.get(url + "/metrics", timeout=60).text, "cpu_seconds_total")
        server = closed("server", url, clients, sampled(asked, options.tokens))
        server.cpu_seconds = _of_both(httpx.get(url + "/metrics", timeout=60).text, "cpu_seconds_total") - cpu
        alone = [own(engine, asked, clients, options.tokens, arrivals) for arrivals in (None, server.arrivals)]
        if repeat:  # the first turn warms both up
            loads += [server, *alone]
    _print_sides(loads)
    return loads


def _beside_peer(url: str, texts: Sequence[str], options: argparse.Namespace, folder: Path) -> list[Load]:
    port, loads = free_port(), []
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--device", "cpu", "--dtype", options.dtype, *options.peer_flags.split()]
    with started(command, port, "/health") as peer:
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


async def _soak(url: str, texts: Sequence[str], options: argparse.Namespace) -> list[tuple[float, float]]:
    """(seconds, resident bytes) of the server while clients keep asking, never twice the same."""
    clients, began = max(map(int, options.clients.split(","))), time.monotonic()
    load = Load("server, long run", clients)

    def requests() -> Iterator[tuple[str, dict[str, Any]]]:
        for seed in count():
            if time.monotonic() - began > 60 * options.minutes:
                return
            text = f"{seed}. {texts[seed % len(texts)]}"
            yield text, {"temperature": 1, "seed": seed, "max_tokens": options.tokens, "ignore_eos": True}

    asking, memory = asyncio.ensure_future(ask_closed(url, load, requests())), []
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        while not asking.done():
            page = (await client.get("/metrics")).text
            memory.append((time.monotonic() - began, _of_both(page, "resident_memory_bytes")))
            await asyncio.wait([asking], timeout=5)
    await asking
    settled = [(at, size / 2**20) for at, size in memory if at > 60 * options.minutes / 4] or [(0.0, 0.0)]
    first, last = (statistics.median(size for _, size in part) for part in (settled[:12], settled[-12:]))
    _print_load(load, f"{options.minutes:g} minutes with {clients} clients")
    print(f"  resident memory {first:.0f} MiB after a quarter of it, {last:.0f} MiB at the end")
    return memory


def _of_both(page: str, name: str) -> float:
    """Added up over the server's processes: the engine's and the one in front of it."""
    names = (f"process_{name}", f"dspark_front_process_{name}")
    return sum(float(line.split()[1]) for line in page.splitlines() if line.startswith(names))


def _texts(texts: Sequence[str], count: int) -> list[str]:
    return [texts[i % len(texts)] for i in range(count)]


def _print_sides(loads: Sequence[Load]) -> None:
    server, engine, same = (
        [load for load in loads if load.side == side] for side in ("server", "engine", "engine, same arrivals")
    )
    share = statistics.median(s.speed / e.speed for s, e in zip(server, engine, strict=True))
    first, gap = (statistics.median(x for load in server for x in getattr(load, n)) for n in ("first_token", "gaps"))
    added = statistics.median(
        ours - alone
        for s, e in zip(server, same, strict=True)
        for ours, alone in zip(s.first_token, e.first_token, strict=True)
    )
    client = statistics.median(load.client_seconds / sum(map(len, load.events)) for load in server)
    cpu, own_cpu = (statistics.median(x.cpu_seconds / x.num_tokens for x in side) for side in (server, engine))
    # Turns lie seconds apart, in which the machine's speed moves; from turn to turn that goes either way.
    added_gaps = sorted(
        statistics.median(s.gaps) - statistics.median(e.gaps) for s, e in zip(server, same, strict=True)
    )
    print(
        f"{server[0].clients:3d} clients: server {statistics.median(x.speed for x in server):6.0f} tokens/s, "
        f"{100 * share:.0f} % of the engine's {statistics.median(x.speed for x in engine):.0f}; "
        f"first token {1000 * first:.1f} ms, {1000 * added:+.1f}; between events {1000 * gap:.1f} ms, "
        f"{1000 * statistics.median(added_gaps):+.1f} (turns {1000 * added_gaps[0]:+.1f} to "
        f"{1000 * added_gaps[-1]:+.1f}); processor time per token {1000 * cpu:.2f} ms, {100 * (cpu / own_cpu - 1):+.0f} %, and "
        f"{1000 * client:.2f} ms of the clients per event",
        flush=True,
    )


def _print_load(load: Load, note: str) -> None:
    first = sorted(load.first_token)
    print(
        f"{load.side}, {note}: {load.speed:.0f} tokens/s, first token median "
        f"{1000 * statistics.median(first):.0f} ms, 95 % within {1000 * first[-1 - len(first) // 20]:.0f} ms",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
