"""Real shapes without downloads: how close to the memory's limit are steps, drafts and whole answers on this device?

    python -m benchmarks.gpu --shape qwen3-4b --minutes 9 --folder OUT
    python -m benchmarks.gpu --shape tiny --device cpu

Targets of Qwen3-4B's, Qwen3-8B's and Llama-3.1-8B's shape and DSpark drafters for them get random weights on the
device. Random models agree on nothing, so in the sections `rounds` and `decode` acceptance is replayed: all passes are
really run, dice decide what is accepted, by --tau or --rates. Beside every time stands its floor: weights and cached
keys and values, read once, at the bandwidth of a copy in the same run. Sections are kept as they end.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

# Run as a file, this folder would come first on the path and its modules could shadow others.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.console import Console

from benchmarks import gpu_captured, gpu_kernels, gpu_overlap, gpu_report, gpu_sections, prompts, report
from benchmarks.contenders import PLAIN, Ours
from benchmarks.floor import copy_bandwidth, floor_of
from benchmarks.gpu_peers import peers
from benchmarks.measure import Contender, Section, measure
from benchmarks.replayed import Dice, rates_for, tau_of
from benchmarks.shapes import SHAPES, build
from dspark.errors import UnsupportedModel
from dspark.target import native
from dspark.target.check import check_parity

SECTIONS = ("steps", "captured", "tilings", "kernels", "overlap", "rounds", "decode", "deterministic")
PEERS = ("eager", "compiled", "continuous")
POLICIES = (
    "off,fixed:1,fixed:3,fixed:5,fixed:7,threshold:0.6,algorithm1,lagged,optimal,tokens-per-batch,startup-table,auto"
)
_PAPER_TAU = 4.73  # DSpark on Qwen3-4B, mean of the paper's nine sets (Table 1)
# Of the minutes.
_SHARES = {
    "steps": 0.12,
    "captured": 0.08,
    "tilings": 0.05,
    "kernels": 0.1,
    "overlap": 0.08,
    "rounds": 0.12,
    "decode": 0.4,
    "deterministic": 0.05,
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", default="qwen3-4b", choices=list(SHAPES))
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    compiling = "compile target and drafter first, and record the target's steps on CUDA (default: on CUDA)"
    add("--compile", action=argparse.BooleanOptionalAction, help=compiling)
    add("--sections", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)} (default: all)")
    add("--requests", help="side by side (default 1,4,16,64,256; tiny: 1,8)")
    add("--contexts", help="cached tokens of each request (default 512,2048,8192,32768; tiny: 64,512)")
    add("--most-tokens", type=int, help="of a target pass in `steps` (default 512; tiny: 64)")
    add("--policies", help="of `decode` (default: off, fixed lengths and every scheduler)")
    add("--peers", help=f"of {', '.join(PEERS)}; '' for none (default: all; on CPU not compiled, which takes minutes)")
    add("--prompt-tokens", type=int, default=128, help="of each prompt in `decode` (default 128)")
    add("--tokens", type=int, help="new ones of each request in `decode` (default 64; tiny: 32)")
    add("--tau", type=float, default=_PAPER_TAU, help="to replay with everything verified (default: the paper's 4.73)")
    add("--rates", help="instead of --tau: P(accepted | all before it were), by position, with commas")
    add("--concentration", type=float, default=3.0, help="of confidences around the rates (default 3: AUC about 0.86)")
    add("--repeats", type=int, default=20, help="of a pass (default 20)")
    add("--minutes", type=float, default=9.0, help="begin nothing that would not end in about this time (default 9)")
    add("--quick", action="store_true", help="fewer sizes, policies and repeats")
    add("--threads", type=int, help="CPU threads")
    add("--folder", type=Path, help="write gpu.json and gpu.png there")
    add("--json", type=Path, metavar="FILE")
    add("--plot", type=Path, metavar="FILE", help="needs matplotlib")
    options = parser.parse_args(arguments)
    _fill_in(options)
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"--sections takes {', '.join(SECTIONS)}; got {', '.join(sorted(unknown))}")
    if unknown := set(options.peers) - set(PEERS):
        parser.error(f"--peers takes {', '.join(PEERS)}; got {', '.join(sorted(unknown))}")
    return options


def _fill_in(options: argparse.Namespace) -> None:
    """Defaults that depend on others."""
    is_small = options.shape == "tiny"
    options.device = torch.device(options.device)
    options.compile = options.device.type == "cuda" if options.compile is None else options.compile
    options.sections = options.sections.split(",")
    everyone = "eager,continuous" if options.device.type == "cpu" else ",".join(PEERS)
    options.peers = [p for p in (everyone if options.peers is None else options.peers).split(",") if p]
    policies = "off,fixed:3,fixed:7,optimal,auto" if options.quick or is_small else POLICIES
    options.policies = (options.policies or policies).split(",")
    requests = "1,8" if is_small else "1,16,128" if options.quick else "1,4,16,64,256"
    contexts = "64,512" if is_small else "512,8192" if options.quick else "512,2048,8192,32768"
    options.requests = [int(n) for n in (options.requests or requests).split(",")]
    options.contexts = [int(n) for n in (options.contexts or contexts).split(",")]
    options.most_tokens = options.most_tokens or (64 if is_small else 512)
    options.tokens = options.tokens or (32 if is_small or options.quick else 64)
    options.repeats = min(options.repeats, 8) if options.quick else options.repeats
    options.rates = [float(r) for r in options.rates.split(",")] if options.rates else None
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
        options.json = options.json or options.folder / "gpu.json"
        options.plot = options.plot or options.folder / "gpu.png"


class Benchmark:
    """One run: models, the floor, and what was found so far."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.options, self.console, self.began = options, console, time.monotonic()
        self.found: dict[str, Any] = {}
        self.say("making the models")
        target, drafter = build(options.shape, options.device, getattr(torch, options.dtype))
        try:
            check_parity(target, "sdpa")
        except UnsupportedModel as error:  # speed is worth knowing all the same
            console.print(f"WRONG RESULTS on this device: {error}", highlight=False)
        rates = options.rates or rates_for(options.tau, drafter.length)
        if len(rates) != drafter.length:
            raise SystemExit(f"--rates takes {drafter.length} of them, the drafter's length; got {len(rates)}")
        if options.device.type == "cpu":
            native.load()
        if options.compile:
            self.say("compiling")
            for layers in ((), drafter.feature_layers):
                target.compile(layers)
            drafter.compile()
        self.target = target
        self.ready = gpu_sections.Ready(target, drafter, Dice(rates, options.concentration), max(options.requests))
        self.floor = floor_of(target, drafter, copy_bandwidth(options.device))
        self.about = report.environment() | {
            "device": gpu_report.device_name(options.device),
            "shape": options.shape,
            "dtype": options.dtype,
            "compiled": options.compile,
            "acceptance": f"replayed: tau {tau_of(rates):.2f} with everything verified, rates {rates[0]:.3f} to {rates[-1]:.3f}",
            "copy": f"{self.floor.bytes_per_second / 1e9:.0f} GB/s",
        }

    def say(self, what: str) -> None:
        print(f"{time.monotonic() - self.began:4.0f} s  {what}", file=sys.stderr, flush=True)

    def run(self) -> None:
        for name in self.options.sections:
            self.found[name] = []
            try:
                getattr(self, name)(self._deadline(name))
            except torch.OutOfMemoryError as error:
                self.console.print(f"{name} ends here, out of memory: {error}", highlight=False)
                torch.cuda.empty_cache()
            self._keep()
            gpu_report.show(self.console, name, self.found[name])

    def _deadline(self, section: str) -> float:
        """The time.monotonic() at which to be done: what is left is shared by the sections to come."""
        now, to_come = time.monotonic(), self.options.sections[self.options.sections.index(section) :]
        left = self.began + 60 * self.options.minutes - now
        return now + left * _SHARES[section] / sum(_SHARES[name] for name in to_come)

    def steps(self, deadline: float) -> None:
        sizes = gpu_sections.step_sizes(self.options.most_tokens, self.options.contexts)
        rows = gpu_sections.steps(self.target, self.floor, sizes, self._most_bytes, self.options.repeats, self.say)
        self._collect("steps", rows, deadline)

    def captured(self, deadline: float) -> None:
        context, repeats = self.options.contexts[0], self.options.repeats
        sizes = [(n, each) for n in self.options.requests for each in (1, 8) if n * each <= self.options.most_tokens]
        rows = gpu_captured.passes(self.target, self.options.compile, self.floor, sizes, context, repeats, self.say)
        self._collect("captured", rows, deadline)

    def tilings(self, deadline: float) -> None:
        self._collect("tilings", gpu_captured.attention(self.target, self.floor, self.say), deadline)

    def kernels(self, deadline: float) -> None:
        loads, repeats = self.options.requests, self.options.repeats
        sizes = [(n, each, context) for context in self.options.contexts for n in loads for each in (1, 8)]
        attention = gpu_kernels.attention_rows(self.target, self.floor, sizes, self._most_bytes, repeats, self.say)
        draws = gpu_kernels.draw_rows(self.target, self.floor, loads, repeats, self.say)
        self._collect("kernels", chain(draws, attention), deadline)

    @property
    def _most_bytes(self) -> int:
        """That a cache may take."""
        return int(0.7 * gpu_report.free_bytes(self.options.device))

    def overlap(self, deadline: float) -> None:
        loads, context = self.options.requests, self.options.contexts[0]
        drafter, repeats = self.ready.drafter.drafter, self.options.repeats
        rows = gpu_overlap.loops(self.target, drafter, self.floor, loads, context, repeats, self.say)
        self._collect("overlap", rows, deadline)

    def rounds(self, deadline: float) -> None:
        context = self.options.contexts[0]
        rows = gpu_sections.rounds(
            self.ready, self.floor, self.options.requests, context, self.options.repeats, self.say
        )
        self._collect("rounds", rows, deadline)

    def deterministic(self, deadline: float) -> None:
        sizes = ((1, 1), (8, 1), (32, 1), (1, 8), (1, 512))
        rows = gpu_sections.deterministic(self.target, sizes, self.options.contexts[0], self.options.repeats, self.say)
        try:
            self._collect("deterministic", rows, deadline)
        except UnsupportedModel as error:  # found by its own check: bits that differ on this device
            self.console.print(str(error), highlight=False)

    def decode(self, deadline: float) -> None:
        options = self.options
        per_request, most = options.prompt_tokens + options.tokens, max(options.requests)
        sizes = (most, options.prompt_tokens, options.tokens)
        others, skipped = peers(self.target, options.peers, *sizes, self.say)
        self.target.resize(max(65536, most * (per_request + 16)))
        began = time.monotonic()
        gpu_sections.learn_costs(
            self.ready, options.requests, options.prompt_tokens, 0.1 * (deadline - began), self.say
        )
        ours: list[Contender] = []
        for policy in options.policies:
            name = PLAIN if policy == "off" else f"ours: dspark@{policy}"
            ours.append(Ours(name, self.ready.engine(policy)))
        results = self.found["decode"]
        for index, requests in enumerate(options.requests):
            if results and time.monotonic() > deadline:
                self.say(f"decode: no time left for {requests} requests")
                break
            num_groups = 3 if requests < 8 else 1  # few requests have few rounds, and dice need some
            read = gpu_sections.random_prompts(self.target, requests * num_groups, options.prompt_tokens)
            groups = prompts.groups_of(read, requests, num_groups)
            contenders = [c for c in (*ours, *others) if c.max_requests >= requests]
            section = Section(requests, 0.0, options.tokens, {c.name: c.family for c in contenders}, groups)
            now = time.monotonic()
            ends = now + (deadline - now) / (len(options.requests) - index)
            measure(section, contenders, 1 if options.quick else 3, ends, self.say)
            context = requests * (options.prompt_tokens + options.tokens // 2)
            results.append(gpu_report.decoded(section, requests / self.floor.step(context), skipped))
        for contender in others:
            contender.close()

    def _collect(self, section: str, rows: Iterable[Any], deadline: float) -> None:
        """At least one, and no more once the time is up."""
        for row in rows:
            self.found[section].append(row)
            if time.monotonic() > deadline:
                return

    def _keep(self) -> None:
        if self.options.json:
            content = {name: [asdict(row) for row in rows] for name, rows in self.found.items()}
            report.write_json(self.options.json, {"machine": self.about, **content})
        if self.options.plot:
            gpu_report.draw(self.options.plot, self.found, self.about)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    console = report.prepare(options)
    benchmark = Benchmark(options, console)
    console.print(", ".join(f"{name} {value}" for name, value in benchmark.about.items()), highlight=False)
    benchmark.run()
    gpu_report.show_aims(console, benchmark.found)


if __name__ == "__main__":
    main()
