"""Every way to choose how much is verified, at loads from one request to many, next to plain decoding, in one run.

    python benchmarks/load.py --quick
    python benchmarks/load.py --prompts HELD_OUT --repeats 7 --json load.json --plot load.png

Everyone runs the same requests (same prompts, lengths and seeds) through one target and one drafter, in turns that are
interleaved and repeated. Each policy has an engine of its own that keeps learning through the run, as a server would;
a first turn of each is not counted. Loading, compiling and the reading of the first prompts are not timed.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Run as a file, this folder would come first on the path and its modules could shadow others.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from benchmarks import load_report, prompts
from benchmarks.load_loops import Served, Slice, Workload, closed_loop, open_loop
from benchmarks.plot import require_matplotlib
from benchmarks.report import write_json
from dspark import Engine, load_drafter, load_target

OFF = "off"
POLICIES = "off,fixed:1,fixed:2,fixed:3,fixed:5,fixed:7,threshold:0.6,algorithm1,lagged,optimal,tokens-per-batch,startup-table,auto"
_QUICK_POLICIES = "off,fixed:1,fixed:3,fixed:7,algorithm1,auto"
_QUICK_MINUTES = 2.4


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--target", default="tiny", help="a name or a folder (default tiny)")
    add("--drafter", default="dspark", help="a name or a folder (default dspark)")
    add("--policies", default=POLICIES, help="off and schedulers, separated by commas (default: all)")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="compile the models (default)")
    add("--prompts", type=Path, help="a .jsonl file or a folder of them (default: a small set of our own)")
    add("--max-prompt-tokens", type=int, default=400, help="longer prompts are left out (default 400)")
    add("--long-every", type=int, default=8, help="each N-th prompt is put behind a long text; 0: none (default 8)")
    add("--requests", default="1,2,4,8,16,32,64", help="loads (default 1,2,4,8,16,32,64)")
    add("--tokens", type=int, default=48, help="tokens per request and turn (default 48)")
    add("--repeats", type=int, default=5, help="turns of each policy at each load (default 5)")
    add("--poisson", default="0.4,0.8", help="arrivals, as shares of what plain decoding serves; empty: none")
    add("--poisson-seconds", type=float, default=20.0, help="of arrivals for each policy and rate (default 20)")
    add("--minutes", type=float, help="begin nothing that would not end in this time")
    add("--threads", type=int, help="(default: torch's choice)")
    add("--quick", action="store_true", help="fewer policies, loads and repeats: ends within three minutes")
    add("--json", type=Path, metavar="FILE", help="everything that was measured")
    add("--plot", type=Path, metavar="FILE", help="a picture; needs matplotlib")
    options = parser.parse_args(arguments)
    if options.quick:
        options.policies = _QUICK_POLICIES if options.policies == POLICIES else options.policies
        options.requests = "1,4,16,64" if options.requests.count(",") > 3 else options.requests
        options.repeats, options.tokens = min(options.repeats, 3), min(options.tokens, 24)
        options.poisson, options.minutes = "", options.minutes or _QUICK_MINUTES
    options.policies = options.policies.split(",")
    if OFF not in options.policies:
        options.policies.insert(0, OFF)
    options.requests = sorted({int(n) for n in options.requests.split(",")})
    options.poisson = [float(share) for share in options.poisson.split(",") if share]
    return options


def load_engines(options: argparse.Namespace) -> dict[str, Engine]:
    """One engine for each policy over one target and one drafter, compiled once."""
    target = load_target(options.target, dtype=options.dtype)
    drafter = load_drafter(options.drafter, target)
    engines: dict[str, Engine] = {}
    for policy in options.policies:
        own, scheduler = (None, "fixed:0") if policy == OFF else (drafter, policy)
        is_first = sum((engine.drafter is drafter) == (own is drafter) for engine in engines.values()) == 0
        engines[policy] = Engine(
            target, own, scheduler, max_num_seqs=max(options.requests), compile=options.compile and is_first
        )
    return engines


def read_prompts(options: argparse.Namespace, tokenizer: Any, max_length: int) -> list[list[int]]:
    """All domains in turn; some of them far back in their context."""
    chosen = prompts.load(options.prompts) if options.prompts else prompts.built_in()
    read = [list(p.token_ids) for p in prompts.by_turns(prompts.encode(chosen, tokenizer, options.max_prompt_tokens))]
    if options.long_every:
        filler = [token for p in read for token in p]
        longest = max_length * 5 // 8
        for n in range(options.long_every - 1, len(read), options.long_every):
            room = longest - len(read[n])
            read[n] = (filler * (room // len(filler) + 1))[:room] + read[n]
    return read


def main(arguments: Sequence[str] | None = None) -> None:
    began = time.monotonic()
    options = parse(arguments)
    if options.plot:
        require_matplotlib()
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    ends = began + 60 * options.minutes if options.minutes else math.inf
    console = Console(width=None if sys.stdout.isatty() else 140)
    with console.status("loading") as status:

        def say(what: str) -> None:
            status.update(f"{time.monotonic() - began:.0f} s: {what}")

        engines = load_engines(options)
        some = engines[OFF]
        texts = read_prompts(options, some.target.tokenizer, some.max_length)
        slices = sweep(options, engines, texts, ends, say)
        served = arrivals(options, engines, texts, slices, say)
    cells = [load_report.cell(policy, n, own, slices[OFF, n]) for (policy, n), own in slices.items()]
    about = {
        "target": options.target,
        "drafter": options.drafter,
        "dtype": options.dtype,
        "compiled": options.compile,
        "hardware": some.capacity.fingerprint["hardware"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": round(time.monotonic() - began),
    }
    load_report.show(console, cells, served)
    console.print(", ".join(f"{name} {value}" for name, value in about.items()))
    if options.json:
        write_json(options.json, load_report.as_json(cells, served, slices, about))
    if options.plot:
        load_report.plot(options.plot, cells, about)


def sweep(
    options: argparse.Namespace, engines: dict[str, Engine], texts: list[list[int]], ends: float, say: Any
) -> dict[tuple[str, int], list[Slice]]:
    """Closed loops: at each load every policy in turn, forwards and backwards, the same requests in each repeat."""
    slices: dict[tuple[str, int], list[Slice]] = {}
    for index, num_requests in enumerate(options.requests):
        now = time.monotonic()
        until = now + (ends - now) / (len(options.requests) - index)
        # Few requests would make turns too short to be timed.
        num_tokens = options.tokens * max(num_requests, 4)
        rounds: list[dict[str, Slice]] = []
        longest = 0.0
        for repeat in range(options.repeats + 1):
            started = time.monotonic()
            if repeat > 1 and started + longest > until:
                break
            order = list(engines) if repeat % 2 else list(reversed(engines))
            say(f"{num_requests} requests, round {repeat} of {options.repeats}")
            workloads = {p: Workload(texts, repeat, options.tokens // 2, 2 * options.tokens) for p in order}
            rounds.append({p: closed_loop(engines[p], workloads[p], num_requests, num_tokens) for p in order})
            longest = max(longest, time.monotonic() - started)
        for policy in engines:
            slices[policy, num_requests] = [r[policy] for r in rounds[1:]]  # the first was a warm-up
    return slices


def arrivals(
    options: argparse.Namespace,
    engines: dict[str, Engine],
    texts: list[list[int]],
    slices: dict[tuple[str, int], list[Slice]],
    say: Any,
) -> dict[str, list[tuple[float, list[Served]]]]:
    """Open loops at shares of the most requests per second that plain decoding was seen to serve."""
    most = max(s.tokens_per_second for (policy, _), own in slices.items() if policy == OFF for s in own)
    served: dict[str, list[tuple[float, list[Served]]]] = {}
    for share in options.poisson:
        per_second = share * most / (1.25 * options.tokens)  # lengths are even between a half and twice of it
        for policy, engine in engines.items():
            say(f"{policy} at {per_second:.1f} requests per second")
            workload = Workload(texts, 1, options.tokens // 2, 2 * options.tokens)
            found = open_loop(engine, workload, per_second, options.poisson_seconds)
            served.setdefault(policy, []).append((per_second, found))
    return served


if __name__ == "__main__":
    main()
