"""What choosing costs: microseconds of each scheduler, by how many requests draft 7 tokens each.

    python benchmarks/scheduling_cost.py

The aim is 300 µs for 256 requests on one CPU core. `beliefs` is what comes before: what is believed of the drafts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Run as a file, this folder would come first on the path and its modules could shadow others.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dspark.budget.beliefs import LiveBeliefs
from dspark.budget.capacity import Capacity
from dspark.budget.prefix_scheduler import falling_survival
from dspark.budget.schedulers import BY_COST, make_scheduler
from dspark.types import Draft, Load, Request, SamplingParams

LENGTH = 7


def known_capacity(most: int) -> Capacity:
    """A machine with a knee, learned from steps of all sizes."""
    capacity, rng = Capacity(), np.random.default_rng(0)
    for _ in range(400):
        requests = int(2 ** rng.uniform(0, np.log2(most)))
        tokens = requests * int(rng.integers(1, 2 + LENGTH))
        capacity.decoding.observe(tokens, requests, 200 * requests, 0.008 * max(1.0, tokens / 200))
    return capacity


def microseconds(call: Callable[[], object], repeats: int) -> float:
    """Median of single calls, by the CPU's clock: others on the machine do not count."""
    taken = []
    for _ in range(repeats):
        begin = time.process_time_ns()
        call()
        taken.append((time.process_time_ns() - begin) / 1000)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", default="1,16,64,256")
    parser.add_argument("--repeats", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    loads = [int(n) for n in options.requests.split(",")]
    capacity = known_capacity(max(loads))
    table = Table("µs", *(f"{n} requests" for n in loads))
    rows: dict[str, list[str]] = {}
    for n in loads:
        torch.manual_seed(0)
        draft = Draft(torch.zeros(n, LENGTH, dtype=torch.long), torch.full((n,), LENGTH), torch.rand(n, LENGTH))
        requests, beliefs = [Request(i, [0], SamplingParams(), 1) for i in range(n)], LiveBeliefs()
        load = Load(n, n, 200 * n, draft_seconds=0.001)
        survival = falling_survival(draft, beliefs.survival(draft, requests))
        calls: dict[str, Callable[[], object]] = {
            "beliefs": lambda: falling_survival(draft, beliefs.survival(draft, requests))  # noqa: B023
        }
        for name in ("fixed:7", "threshold:0.6", *BY_COST):
            scheduler = make_scheduler(name, capacity, allows_anticipation=True)
            calls[name] = lambda s=scheduler: s.choose(draft, survival, load)  # type: ignore[misc]  # noqa: B023
        for name, call in calls.items():
            rows.setdefault(name, []).append(f"{microseconds(call, options.repeats):.0f}")
    for name, values in rows.items():
        table.add_row(name, *values)
    Console().print(table)


if __name__ == "__main__":
    main()
