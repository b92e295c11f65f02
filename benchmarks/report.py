"""What a run found, as text for people and as JSON for programs."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers.utils import logging as transformers_logging

from benchmarks import plot, summary, table
from benchmarks.claims import Result, aims, losses
from benchmarks.contenders import PLAIN
from benchmarks.identity import GapOf, Identity, compare
from benchmarks.lineup import Lineup
from benchmarks.measure import Section
from benchmarks.summary import fastest


def prepare(options: argparse.Namespace) -> Console:
    """Threads, silence, and nothing measured in vain: what a benchmark does first. Returns where it prints."""
    if options.plot:
        plot.require_matplotlib()
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    return Console(width=None if sys.stdout.isatty() else 140)


def machine(lineup: Lineup, options: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to judge or repeat the figures."""
    return {
        "dtype": options.dtype,
        "compiled": options.compile,
        "scheduler": options.scheduler,
        "target": Path(options.target).name,
        **environment(),
        **lineup.versions,
    }


def environment() -> dict[str, Any]:
    """The machine and the versions."""
    return {
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    units = [unit for unit in ("amx_bf16", "avx512_bf16", "avx2") if unit in flags]
    return f"{model or platform.machine()} ({units[0] if units else 'no bfloat16 units known'})"


def _commit() -> str:
    """The commit of the checkout this file lies in, with a plus where files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=10"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else "no commit"


def result(section: Section) -> Result:
    rows = summary.rows(section, list(section.families))
    ours = [name for name, family in section.families.items() if family == "ours"]
    accepted = {name: a for name in ours if name != PLAIN and (a := summary.acceptance(section.of(name)))}
    times = {name: t for name in ours if (t := summary.step_time(drafter_of(name), section.of(name)))}
    return Result(section, rows, accepted, times)


def drafter_of(contender: str) -> str:
    """`ours: dspark@threshold:0.6` -> `dspark`."""
    return "none" if contender == PLAIN else contender.removeprefix("ours: ").partition("@")[0]


def identities(sections: Sequence[Section], dtype: str, gap_of: GapOf | None) -> list[tuple[Section, Identity]]:
    """Our drafters, and transformers' greedy in the same dtype, against our plain decoding."""
    found = []
    for section in sections:
        if PLAIN not in section.families:
            continue
        for name, family in section.families.items():
            same_law = family == "ours" or (section.temperature == 0 and not name.endswith("fp32"))
            if name != PLAIN and same_law:
                found.append((section, compare(section, name, PLAIN, dtype, gap_of)))
    return found


def show_machine(console: Console, about: dict[str, Any], lineup: Lineup) -> None:
    console.print("\n" + ", ".join(f"{key} {value}" for key, value in about.items()), highlight=False, markup=False)
    for line in lineup.skipped:
        console.print(f"skipped: {line}", highlight=False, markup=False)


def show(console: Console, result: Result, end_tokens: set[int]) -> None:
    baselines = {PLAIN: "vs ours plain"}
    for family, heading in (("transformers", "vs transformers' best"), ("vllm", "vs vLLM's best")):
        if best := fastest(result.rows, family):
            baselines[best.contender] = heading
    console.print()
    console.print(table.rates(result.section, result.rows, baselines))
    if PLAIN in result.section.families:
        past, texts = summary.past_their_end(result.section.of(PLAIN), end_tokens)
        if past and result.section.temperature == 0:
            console.print(
                f"{past} of {texts} texts go on past their natural end, where a small model repeats itself: "
                "flatters every way of drafting, n-grams most",
                highlight=False,
            )
    if result.section.num_requests == 1:
        title = result.section.title
        if result.acceptance:
            console.print(table.acceptance(result.acceptance, f"Acceptance, {title}"))
        if result.step_times:
            console.print(table.step_times(result.step_times, f"Where a step's time goes, {title}"))


def show_verdicts(console: Console, found: Sequence[Result], same: Sequence[tuple[Section, Identity]]) -> None:
    console.print()
    table.show(
        console,
        table.identities([(section.title, i) for section, i in same], PLAIN),
        table.aims(aims(found)),
        table.losses(losses(found)),
    )


def as_json(
    found: Sequence[Result], same: Sequence[tuple[Section, Identity]], about: dict[str, Any], lineup: Lineup
) -> dict[str, Any]:
    """Every run is in it, but not its tokens."""
    return {
        "machine": about,
        "skipped": lineup.skipped,
        "sections": [
            {
                "num_requests": r.section.num_requests,
                "temperature": r.section.temperature,
                "num_tokens": r.section.lengths or r.section.num_tokens,
                "num_repeats": r.section.num_repeats,
                "rows": [asdict(row) for row in r.rows],
                "acceptance": {name: asdict(a) for name, a in r.acceptance.items()},
                "step_times": {name: asdict(t) for name, t in r.step_times.items()},
                "identity": [asdict(i) for section, i in same if section is r.section],
                "runs": [
                    {
                        "contender": s.contender,
                        "group": s.group,
                        "repeat": s.repeat,
                        "domain": s.domain,
                        "seconds": s.run.seconds,
                        "num_tokens": s.run.num_tokens,
                    }
                    for s in r.section.samples
                ],
            }
            for r in found
        ],
        "aims": [{"reached": is_reached, "aim": line} for is_reached, line in aims(found)],
        "losses": losses(found),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
