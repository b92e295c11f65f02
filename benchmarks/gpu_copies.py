"""How often the host waits for a device in one decoding step, counted without one.

    python -m benchmarks.gpu_copies

A pretended card (tests/pretend_cuda.py) holds its values on the host and counts every copy. What is counted makes the
host wait until the device has done all that it was told: copies to the host, and copies to the device from memory that
is not pinned. Triton's kernels are left out, which need no copies.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

# Run as a file, this folder would come first on the path; and the pretended card lies with the tests.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

import pytest
import torch
from rich.console import Console
from rich.table import Table

from dspark import Engine, SamplingParams, load_drafter, load_target, sampling
from dspark.target import kernels
from pretend_cuda import DEVICE, Ledger, pretend_cuda

PENALTY = {"repetition_penalty": 1.2}
CASES: Sequence[tuple[str, str, Mapping[str, Any], Mapping[str, Any], str]] = (
    ("plain", "none", {}, {}, "coupled"),
    ("plain, a repetition penalty and log-probabilities", "none", {}, PENALTY | {"logprobs": 2}, "coupled"),
    ("DSpark", "dspark", {}, {}, "coupled"),
    ("DSpark with a repetition penalty", "dspark", {}, PENALTY, "coupled"),
    ("DSpark's tree of 15", "dspark", {"tree": 15}, {}, "coupled"),
    ("EAGLE-3", "eagle3", {}, {}, "coupled"),
    ("EAGLE-3's tree of 15", "eagle3", {"tree": 15}, {}, "coupled"),
    ("draft model", "draft", {}, {}, "coupled"),
    ("DSpark under the rejection rule", "dspark", {}, {}, "rejection"),
)
PROMPTS = [[*range(5, 13)], [30, 31], [40, 41, 42]]


def count(engine: Engine, ledger: Ledger, params: Mapping[str, Any]) -> tuple[float, float, float]:
    """Copies to the host, copies to the device that wait, and bytes to the host: medians over four steps of three requests."""
    told = SamplingParams(temperature=0.8, max_tokens=60, seed=1, ignore_eos=True, **params)
    for prompt in PROMPTS:
        engine.submit(prompt, told)
    for _ in range(2):  # prompts are read
        engine.step()
    steps = []
    for _ in range(4):
        ledger.copies.clear()
        engine.step()
        come = ledger.of("to host")
        steps.append((len(come), len(ledger.of("to device")), sum(copy.num_bytes for copy in come)))
    to_host, to_device, num_bytes = (median(counts) for counts in zip(*steps, strict=True))
    return to_host, to_device, num_bytes


def main() -> None:
    torch.set_num_threads(1)
    table = Table(
        "three requests, temperature 0.8, fixed:7, uncompiled", "to the host", "to the device", "bytes to the host"
    )
    with pytest.MonkeyPatch.context() as patch, pretend_cuda(patch) as ledger:
        for part in (kernels, sampling):
            patch.setattr(part, "runs_triton", lambda device: False)
        target = load_target("tiny", dtype="float32", device=str(DEVICE), check=False)
        for name, kind, options, params, rule in CASES:
            engine = Engine(target, load_drafter(kind, target, **options), "fixed:7", rule)
            table.add_row(name, *(f"{number:g}" for number in count(engine, ledger, params)))
            engine.fail_running()
    Console().print(table)


if __name__ == "__main__":
    main()
