"""How soon beliefs are right again on the real engine, after traffic or the machine has changed between two steps.

    python benchmarks/recovery.py --threads 2 --plot recovery.png

So many requests decode at temperature 1, always drafted for. At step 0 either everyone asks about something else, or torch
gets half of its threads. Calibration error is the expected calibration error of survival by position, each counting as often
as it was verified, in windows of steps, beside what chance alone would show; cost error is the median of
|predicted / measured - 1| over the steps of a window. Nothing is compiled: compiled graphs keep the number of threads.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Run as a file, this folder would come first on the path and its modules could shadow others.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.utils import logging as transformers_logging

from benchmarks import prompts
from benchmarks.calibration_trials import drawn, pooled_error
from benchmarks.load_loops import ClosedLoop, Workload
from benchmarks.measure import leave_alone
from benchmarks.plot import require_matplotlib
from benchmarks.report import write_json
from dspark import Engine, SamplingParams, load_drafter, load_target
from dspark.budget.capacity import Capacity
from dspark.target.target import Target
from dspark.types import Drafter, StepRecord

BEFORE, AFTER, WINDOW = 300, 240, 20  # steps
_SHOWN_BEFORE = 100  # steps
_AIMS = {"calibration": 0.03, "cost": 0.10}


@dataclass
class Observed:
    """What was believed of draft tokens [B, K] in each step, what was verified, and what was accepted of that."""

    believed: list[Tensor] = field(default_factory=list)
    known: list[Tensor] = field(default_factory=list)
    happened: list[Tensor] = field(default_factory=list)
    cost_error: list[float] = field(default_factory=list)

    def add(self, record: StepRecord, length: int) -> None:
        def wide(values: Tensor | None) -> Tensor:
            if values is None or not values.numel():
                return torch.zeros(len(record.request_ids), length)
            return torch.nn.functional.pad(values.float(), (0, length - values.shape[1]))

        self.believed.append(wide(record.survival))
        self.known.append(wide(record.kept).bool())
        self.happened.append(wide(record.accepted_nodes).bool())
        self.cost_error.append(abs(record.predicted_seconds / record.step_seconds - 1))


class Tempered(Workload):
    """The same requests, all at temperature 1."""

    def next(self) -> tuple[list[int], SamplingParams]:
        prompt, params = super().next()
        return prompt, SamplingParams(temperature=1.0, max_tokens=params.max_tokens, ignore_eos=True, seed=params.seed)


def switch(
    target: Target, drafter: Drafter, before: Sequence[Any], after: Sequence[Any], threads: int, num: int, seed: int
) -> Observed:
    """One run of `num` requests: BEFORE steps, then AFTER steps with other prompts or another number of threads."""
    most_threads = torch.get_num_threads()
    seen = Observed()
    engine = Engine(target, drafter, "optimal", max_num_seqs=num, capacity=Capacity())
    engine.observers.append(lambda record: seen.add(record, drafter.length))
    loop = ClosedLoop(engine, Tempered(before, seed, 24, 96), num)
    try:
        _steps(loop, seen, BEFORE)
        if after is not before:
            loop.end()
            loop = ClosedLoop(engine, Tempered(after, seed, 24, 96), num)
        torch.set_num_threads(threads)
        _steps(loop, seen, BEFORE + AFTER)
    finally:
        torch.set_num_threads(most_threads)
        loop.end()
    return seen


def _steps(loop: ClosedLoop, seen: Observed, until: int) -> None:
    while len(seen.cost_error) < until:
        loop.run(loop.num_tokens + 1)


def curves(runs: Sequence[Observed]) -> dict[str, list[float]]:
    """Errors in windows of steps, all runs together."""
    edges = range(BEFORE - _SHOWN_BEFORE, BEFORE + AFTER, WINDOW)
    return {
        "steps": [float(e + WINDOW // 2 - BEFORE) for e in edges],
        "calibration": [pooled_error(runs, e, e + WINDOW) for e in edges],
        "chance": [pooled_error(runs, e, e + WINDOW, drawn) for e in edges],
        "cost": [statistics.median(x for run in runs for x in run.cost_error[e : e + WINDOW]) for e in edges],
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--target", default="tiny", help="a name or a folder (default tiny)")
    add("--drafter", default="dspark", help="a name or a folder (default dspark)")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    add("--prompts", type=Path, help="a .jsonl file or a folder of them (default: a small set of our own)")
    add("--traffic", default="math,chat", help="domains before and after the switch (default math,chat)")
    add("--requests", type=int, default=8, help="side by side (default 8)")
    add("--repeats", type=int, default=8, help="runs of each kind (default 8)")
    add("--threads", type=int, help="before the switch; half of them after it (default: torch's choice)")
    add("--json", type=Path, metavar="FILE", help="everything that was measured")
    add("--plot", type=Path, metavar="FILE", help="a picture; needs matplotlib")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.plot:
        require_matplotlib()
    if options.threads:
        torch.set_num_threads(options.threads)
    threads = torch.get_num_threads()
    transformers_logging.disable_progress_bar()
    target = load_target(options.target, dtype=options.dtype)
    drafter = load_drafter(options.drafter, target)
    chosen = prompts.load(options.prompts) if options.prompts else prompts.built_in()
    encoded = prompts.encode(chosen, target.tokenizer, 300)
    first, second = ([list(p.token_ids) for p in encoded if p.domain == d] for d in options.traffic.split(","))
    kinds = {
        " to ".join(options.traffic.split(",")): (second, threads),
        f"{threads} threads to {max(1, threads // 2)}": (first, max(1, threads // 2)),
    }
    leave_alone()
    found = {}
    console = Console(width=None if sys.stdout.isatty() else 140)
    with console.status("") as status:
        for name, (after, threads_after) in kinds.items():
            runs = []
            for repeat in range(options.repeats):
                status.update(f"{name}, run {repeat + 1} of {options.repeats}")
                runs.append(switch(target, drafter, first, after, threads_after, options.requests, repeat))
            found[name] = curves(runs)
    for name, errors in found.items():
        show(console, name, errors)
    about = {"dtype": options.dtype, "requests": options.requests, "repeats": options.repeats, "threads": threads}
    console.print(", ".join(f"{key} {value}" for key, value in about.items()))
    if options.json:
        write_json(options.json, {"about": about, "switches": found})
    if options.plot:
        plot(options.plot, found)


def show(console: Console, name: str, errors: dict[str, list[float]]) -> None:
    table = Table(title=f"{name}, at step 0", title_justify="left")
    table.add_column("steps")
    for head in ("calibration error", "chance alone", "cost error"):
        table.add_column(head, justify="right")
    for step, *values in zip(*(errors[key] for key in ("steps", "calibration", "chance", "cost")), strict=True):
        table.add_row(f"{step - WINDOW / 2:.0f} to {step + WINDOW / 2:.0f}", *(f"{value:.1%}" for value in values))
    console.print(table)


def plot(path: Path, found: dict[str, dict[str, list[float]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(found), figsize=(5 * len(found), 5), layout="constrained", squeeze=False)
    for (upper, lower), (name, errors) in zip(axes.T, found.items(), strict=True):
        upper.plot(errors["steps"], [100 * e for e in errors["calibration"]], marker=".", color="#2a9d5c", label="live")
        upper.plot(errors["steps"], [100 * e for e in errors["chance"]], "--", color="#777777", label="chance alone")
        lower.plot(errors["steps"], [100 * e for e in errors["cost"]], marker=".", color="#2a6f97")
        for axis, kind in ((upper, "calibration"), (lower, "cost")):
            axis.axvline(0, color="black", linewidth=0.6)
            axis.axhline(100 * _AIMS[kind], color="#c0392b", linewidth=0.6, linestyle=":")
            axis.set(title=f"{name}: {kind} error, %", xlabel="steps after the switch", ylim=(0, None))
    axes[0][0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
