"""How often the host waits for a device in one decoding step, counted without one.

    python -m benchmarks.gpu_copies

A pretended card (tests/pretend_cuda.py) holds its values on the host and counts every copy. What is counted makes the
host wait until the device has done all that it was told: copies to the host, and copies to the device from memory that
is not pinned. Apart from these, waits for a step before while the device goes on with the next. Triton's kernels are
left out, which need no copies.
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
CASES: Sequence[tuple[str, str, Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]] = (
    ("plain", "none", {}, {}, {}),
    ("plain, overlapped", "none", {}, {}, {"overlap": True}),
    ("plain, a repetition penalty and log-probabilities", "none", {}, PENALTY | {"logprobs": 2}, {}),
    ("DSpark", "dspark", {}, {}, {}),
    ("DSpark, overlapped", "dspark", {}, {}, {"overlap": True}),
    ("DSpark with a repetition penalty", "dspark", {}, PENALTY, {}),
    ("DSpark's tree of 15", "dspark", {"tree": 15}, {}, {}),
    ("EAGLE-3", "eagle3", {}, {}, {}),
    ("EAGLE-3's tree of 15", "eagle3", {"tree": 15}, {}, {}),
    ("draft model", "draft", {}, {}, {}),
    ("DSpark under the rejection rule", "dspark", {}, {}, {"rule": "rejection"}),
)
PROMPTS = [[*range(5, 13)], [30, 31], [40, 41, 42]]


def count(engine: Engine, ledger: Ledger, params: Mapping[str, Any]) -> list[float]:
    """Copies to the host that wait, copies to the device that do, waits for the step before, and bytes to the host.

    Medians over four steps of three requests.
    """
    told = SamplingParams(temperature=0.8, max_tokens=60, seed=1, ignore_eos=True, **params)
    for prompt in PROMPTS:
        engine.submit(prompt, told)
    for _ in range(3):  # prompts are read, and the overlapped loop is ahead
        engine.step()
    steps = []
    for _ in range(4):
        ledger.copies.clear()
        engine.step()
        num_bytes = sum(copy.num_bytes for copy in ledger.of("to host", "coming"))
        steps.append(
            [*(len(ledger.of(*kinds)) for kinds in (("to host", "wait"), ("to device",), ("late",))), num_bytes]
        )
    return [median(counts) for counts in zip(*steps, strict=True)]


def main() -> None:
    torch.set_num_threads(1)
    what = "three requests, temperature 0.8, fixed:7, uncompiled"
    table = Table(what, "to the host", "to the device", "one step behind", "bytes to the host")
    with pytest.MonkeyPatch.context() as patch, pretend_cuda(patch) as ledger:
        for part in (kernels, sampling):
            patch.setattr(part, "runs_triton", lambda device: False)
        target = load_target("tiny", dtype="float32", device=str(DEVICE), check=False)
        for name, kind, options, params, how in CASES:
            engine = Engine(target, load_drafter(kind, target, **options), "fixed:7", **how)
            table.add_row(name, *(f"{number:g}" for number in count(engine, ledger, params)))
            engine.fail_running()
    Console().print(table)


if __name__ == "__main__":
    main()
