"""What the load benchmark found, as tables, numbers and pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.load_loops import Arrivals, PlainCost, Slice

# Two-sided 95 % of Student's t by degrees of freedom.
_T = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13]


@dataclass(frozen=True)
class Cell:
    """One policy at one load. ratio: work done per second over that of `off` in the same repeat, mean and half its 95 %
    interval (PlainCost says what work is). What is not known of a peer is 0.
    """

    policy: str
    num_requests: int
    tokens_per_second: float
    ratio: float
    ratio_within: float
    budget: float
    tau: float
    asked: float
    wasted: float
    predicted_over_accepted: float | None
    scheduling: float


def cell(
    policy: str, num_requests: int, slices: Sequence[Slice], all_slices: Mapping[tuple[str, int], Sequence[Slice]]
) -> Cell:
    # Whole batches are compared with whole batches.
    plain = all_slices["batch: off" if policy.startswith("batch: ") else "off", num_requests]
    cost = PlainCost.of(plain)
    # Logarithms, so that twice as fast and half as fast are as far from equal.
    logs = [math.log(cost.speed(s) / cost.speed(p)) for s, p in zip(slices, plain, strict=True)]
    mean = statistics.mean(logs)
    within = _T[min(len(logs) - 2, len(_T) - 1)] * statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else 0
    decoded, verified = max(1, sum(s.decoded for s in slices)), sum(s.verified for s in slices)
    accepted, foretold = sum(s.accepted for s in slices), sum(s.foretold for s in slices)
    predicted = sum(s.predicted_accepted for s in slices)
    seconds = sum(s.seconds for s in slices)
    return Cell(
        policy,
        num_requests,
        sum(s.tokens for s in slices) / seconds,
        math.exp(mean),
        math.exp(mean) * within,
        verified / decoded,
        1 + accepted / decoded,
        sum(s.asked for s in slices) / decoded,
        1 - accepted / verified if verified else 0.0,
        predicted / foretold if predicted and foretold else None,  # of a fixed length nothing is foretold
        sum(s.phases["schedule"] for s in slices) / seconds,
    )


def verdicts(cells: Sequence[Cell]) -> list[str]:
    """What `auto` should show, in words and numbers."""
    by_load: dict[int, dict[str, Cell]] = {}
    for c in cells:
        by_load.setdefault(c.num_requests, {})[c.policy] = c
    if any("auto" not in row for row in by_load.values()):
        return []
    lines = []
    for num_requests, row in by_load.items():
        simple = [c for name, c in row.items() if name == "off" or name.startswith("fixed")]
        best = max(simple, key=lambda c: c.ratio)
        auto = row["auto"]
        lines.append(
            f"{num_requests} requests: auto at {auto.ratio / best.ratio:.3f} of the best fixed choice ({best.policy}), "
            f"{auto.ratio:.3f} ± {auto.ratio_within:.3f} of off"
        )
    names = [n for n in next(iter(by_load.values())) if n.startswith("fixed")]
    for name in names:
        gain = statistics.mean(math.log(row["auto"].ratio / row[name].ratio) for row in by_load.values())
        lines.append(f"whole sweep: auto {100 * (math.exp(gain) - 1):+.1f} % against {name} (geometric mean)")
    return lines


def show(console: Any, cells: Sequence[Cell], served: Mapping[str, Sequence[Arrivals]]) -> None:
    from rich.table import Table

    for num_requests in sorted({c.num_requests for c in cells}):
        table = Table(title=f"{num_requests} requests at a time", title_justify="left")
        heads = ("policy", "tokens/s", "over off", "± 95 %", "verified", "tau", "drafted for", "wasted")
        for head in (*heads, "promised/accepted", "scheduling"):
            table.add_column(head, justify="left" if head == "policy" else "right")
        for c in (c for c in cells if c.num_requests == num_requests):
            promised = "" if c.predicted_over_accepted is None else f"{c.predicted_over_accepted:.2f}"
            values = f"{c.tokens_per_second:.0f} {c.ratio:.2f} {c.ratio_within:.2f} {c.budget:.2f} {c.tau:.2f}".split()
            table.add_row(c.policy, *values, f"{c.asked:.0%}", f"{c.wasted:.0%}", promised, f"{c.scheduling:.1%}")
        console.print(table)
    if served:
        table = Table(title="Poisson arrivals", title_justify="left")
        heads = ("policy", "requests/s", "served", "unfinished", "tokens/s per request", "first token s")
        for head in (*heads, "slowest tenth s"):
            table.add_column(head, justify="left" if head == "policy" else "right")
        for policy, runs in served.items():
            for run in runs:
                table.add_row(policy, f"{run.per_second:.2f}", *_latencies(run))
        console.print(table)
    for line in verdicts(cells):
        console.print(line)


def _latencies(run: Arrivals) -> list[str]:
    counts = [str(len(run.served)), str(run.num_unfinished)]
    if not run.served:
        return [*counts, "", "", ""]
    speed = statistics.median(r.num_tokens / r.seconds for r in run.served)
    first = statistics.median(r.first_token_seconds for r in run.served)
    slowest = sorted(r.seconds for r in run.served)[int(0.9 * (len(run.served) - 1))]
    return [*counts, f"{speed:.0f}", f"{first:.3f}", f"{slowest:.2f}"]


def as_json(
    cells: Sequence[Cell],
    served: Mapping[str, Sequence[Arrivals]],
    slices: Mapping[tuple[str, int], Sequence[Slice]],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "about": dict(about),
        "cells": [asdict(c) for c in cells],
        "verdicts": verdicts(cells),
        "tokens_per_second": [
            {"policy": policy, "requests": n, "repeats": [s.tokens_per_second for s in of_policy]}
            for (policy, n), of_policy in slices.items()
        ],
        "open": {policy: [asdict(run) for run in runs] for policy, runs in served.items()},
    }


def plot(path: Path, cells: Sequence[Cell], about: Mapping[str, Any]) -> None:
    """Speed over plain decoding and verified tokens by load, and throughput against speed per user."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(16, 5), layout="constrained")
    for policy in dict.fromkeys(c.policy for c in cells):
        own = [c for c in cells if c.policy == policy]
        loads = [c.num_requests for c in own]
        style: dict[str, Any] = dict(marker="o", markersize=4, label=policy)
        if policy.startswith("batch: "):  # not the same work: prompts are read on the way
            continue
        if policy == "auto":
            style |= dict(linewidth=3, color="#2a9d5c", zorder=5)
        elif policy == "off":
            style |= dict(linestyle="--", color="black")
        else:
            style |= dict(linewidth=1, alpha=0.8)
        left.errorbar(loads, [c.ratio for c in own], [c.ratio_within for c in own], **style)
        middle.plot([c.tokens_per_second / c.num_requests for c in own], [c.tokens_per_second for c in own], **style)
        right.plot(loads, [c.budget for c in own], **style)
    left.set(xscale="log", xlabel="requests at a time", ylabel="speed over plain decoding")
    middle.set(xscale="log", xlabel="tokens/s per request", ylabel="tokens/s of all requests")
    right.set(xscale="log", xlabel="requests at a time", ylabel="draft tokens verified per request and step")
    left.legend(fontsize=8)
    figure.suptitle(", ".join(f"{k} {v}" for k, v in about.items()), fontsize=8)
    figure.savefig(path, dpi=130)
