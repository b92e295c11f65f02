"""The same schedulers on machines that are not here: recorded confidences, made-up or measured seconds per step.

    python benchmarks/simulate.py
    python benchmarks/simulate.py --machine measured --capacity capacity.json --against load.json
    python benchmarks/simulate.py --noise 0.1 --steps 1000     # nobody knows what steps cost; everyone learns it from them

Drafts are recorded once from the real engine and verified in full, so it is known how much of each the target accepts.
A simulated request goes through the recorded drafts of one real request; what is verified of a draft and what a step
costs is decided anew. Approximate in one place: after a shorter verification the next draft would start elsewhere.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

# Run as a file, this folder would come first on the path and its modules could shadow others.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from benchmarks import prompts
from dspark import Engine, SamplingParams, load_drafter, load_target
from dspark.budget.capacity import Capacity
from dspark.budget.guard import Guard
from dspark.budget.prefix_scheduler import falling_survival, survival_of
from dspark.budget.schedulers import AUTO, make_scheduler
from dspark.types import Draft, Load, StepRecord

POLICIES = "off,fixed:1,fixed:3,fixed:5,fixed:7,threshold:0.6,algorithm1,lagged,optimal,tokens-per-batch,auto"


_ENDS = 0.01  # share of the requests that end in a step, and others come


class Machine(Capacity):
    """Seconds by formula: reading the weights (base), arithmetic of tokens beyond a knee, reading the context.

    step         sizes are rounded up to multiples of it, as captured graphs and tiles do
    draft_share  of base, for the drafter's weights
    """

    is_known = True

    def __init__(
        self,
        base: float,
        per_token: float,
        knee: int = 0,
        step: int = 1,
        per_context: float = 0.0,
        draft_share: float = 0.12,
    ) -> None:
        super().__init__()
        self.base, self.per_token, self.knee, self.step = base, per_token, knee, step
        self.per_context, self.draft_share = per_context, draft_share

    def seconds(self, tokens: Any, requests: int, context_tokens: int, is_reading: bool = False) -> Any:
        rounded = self.step * np.ceil(np.asarray(tokens) / self.step)
        return self.base + self.per_token * np.maximum(0.0, rounded - self.knee) + self.per_context * context_tokens

    def draft_seconds(self, requests: int, context_tokens: int) -> float:
        # A drafter reads a block of about eight positions for each request.
        read = self.per_token * max(0, 8 * requests - self.knee)
        return self.draft_share * (self.base + read) if requests else 0.0

    def observe(self, record: StepRecord) -> None:
        pass


MACHINES = {
    "smooth": lambda: Machine(base=8e-3, per_token=3e-5, knee=256),
    "staircase": lambda: Machine(base=8e-3, per_token=3e-5, step=64),
    "long-context": lambda: Machine(base=8e-3, per_token=3e-5, knee=256, per_context=1e-7),
}


@dataclass
class Recorded:
    """Drafts of one request: confidence [n, K], and how many tokens the target accepted of each."""

    confidence: torch.Tensor
    accepted: list[int]


def record(target: str, drafter: str, num_tokens: int, path: Path | None) -> list[Recorded]:
    """Run the real engine with everything verified."""
    loaded = load_target(target)
    steps: list[StepRecord] = []
    engine = Engine(loaded, load_drafter(drafter, loaded), "fixed:99", observers=[steps.append], capacity=Capacity())
    chosen = prompts.load(path) if path else prompts.built_in()
    read = prompts.by_turns(prompts.encode(chosen, loaded.tokenizer, 400))[:32]
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, seed=0)
    engine.generate([list(p.token_ids) for p in read], params)
    found: dict[int, list[tuple[torch.Tensor, int]]] = {}
    for step in steps:
        if step.confidence is None:
            continue
        for b, request_id in enumerate(step.request_ids):
            if step.drafted[b] == step.verified[b] > 0:
                found.setdefault(request_id, []).append((step.confidence[b], step.accepted[b]))
    return [Recorded(torch.stack([c for c, _ in rounds]), [a for _, a in rounds]) for rounds in found.values()]


def simulate(
    policy: str,
    machine: Capacity,
    recorded: Sequence[Recorded],
    num_requests: int,
    num_steps: int,
    noise: float | None = None,
    seed: int = 1,
) -> float:
    """Tokens per second of a closed loop.

    noise  of a step's seconds (log-normal), from which their costs are learned; None: costs are known
    seed   of the noise, and of which drafts come when
    """
    rng = random.Random(seed)
    believed = machine if noise is None else Capacity()
    learners: list[Any] = [] if noise is None else [believed]
    scheduler = make_scheduler("fixed:0" if policy == "off" else policy, believed, allows_anticipation=True)
    guard = Guard(believed) if policy == AUTO else None
    length = recorded[0].confidence.shape[1]
    ids = count()
    # Each request: its id, whose drafts it goes through, and where it is.
    state = [(next(ids), rng.randrange(len(recorded)), rng.randrange(10_000)) for _ in range(num_requests)]
    context, tokens, seconds = 200 * num_requests, 0.0, 0.0
    for now in range(num_steps + num_steps // 4):
        load = Load(num_requests, num_requests, context)
        rows = list(range(num_requests)) if policy != "off" else []
        if guard is not None:
            rows = guard.choose([request_id for request_id, _, _ in state], load)
        sizes = torch.zeros(num_requests, dtype=torch.long)
        sizes[rows] = length
        traces = [recorded[which] for _, which, _ in state]
        places = [place % len(t.accepted) for t, (_, _, place) in zip(traces, state, strict=True)]
        confidence = torch.stack([t.confidence[p] for t, p in zip(traces, places, strict=True)])
        draft = Draft(torch.zeros(num_requests, length, dtype=torch.long), sizes, confidence)
        survival = falling_survival(draft, survival_of(draft, confidence))
        draft_seconds = machine.draft_seconds(len(rows), context)
        stretch = 1.0 if noise is None else rng.lognormvariate(0, noise)
        load = Load(num_requests, num_requests, context, draft_seconds * stretch)
        keep = scheduler.choose(draft, survival, load)
        limits = torch.tensor([t.accepted[p] for t, p in zip(traces, places, strict=True)])
        accepted = keep & (draft.depth <= limits[:, None])
        num_tokens = num_requests + int(keep.sum())
        step_seconds = float(machine.seconds(np.array([num_tokens]), num_requests, context)[0])
        step = StepRecord(
            request_ids=[request_id for request_id, _, _ in state],
            drafted=sizes.tolist(),
            verified=keep.sum(1).tolist(),
            accepted=accepted.sum(1).tolist(),
            survival=survival if rows else None,
            kept=keep,
            accepted_nodes=accepted,
            load=load,
            num_asked=len(rows),
            num_tokens=num_tokens,
            seconds={"target": step_seconds * stretch, "draft": draft_seconds * stretch},
            predicted_accepted=float((survival * keep).sum()),
        )
        for learner in (*learners, guard, scheduler):
            if hasattr(learner, "observe"):
                learner.observe(step)
        state = [
            (next(ids), rng.randrange(len(recorded)), 0) if rng.random() < _ENDS else (i, which, place + 1)
            for i, which, place in state
        ]
        if now >= num_steps // 4:  # the first steps are for learning
            tokens += num_requests + int(accepted.sum())
            seconds += step_seconds + draft_seconds
    return tokens / seconds


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--machine", default="smooth,staircase", help=f"of {', '.join(MACHINES)}, measured (default smooth,staircase)")
    add("--capacity", type=Path, metavar="FILE", help="what `dspark profile --output FILE` wrote, for measured")
    add("--policies", default=POLICIES)
    add("--requests", default="1,8,32,128,256")
    add("--steps", type=int, default=200, help="counted steps of each policy (default 200)")
    add("--noise", type=float, help="of a step's seconds, from which costs are learned (default: they are known)")
    add("--target", default="tiny")
    add("--drafter", default="dspark")
    add("--prompts", type=Path, help="a .jsonl file or a folder of them (default: a small set of our own)")
    add("--tokens", type=int, default=96, help="recorded per prompt (default 96)")
    add("--against", type=Path, metavar="FILE", help="of benchmarks/load.py --json: compare with what was measured")
    add("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if unknown := set(options.machine.split(",")) - {*MACHINES, "measured"}:
        parser.error(f"--machine takes {', '.join(MACHINES)}, measured; got {', '.join(sorted(unknown))}")
    if "measured" in options.machine and options.capacity is None:
        parser.error("--machine measured needs --capacity FILE")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    transformers_logging.disable_progress_bar()
    policies, loads = options.policies.split(","), [int(n) for n in options.requests.split(",")]
    console = Console(width=None if sys.stdout.isatty() else 140)
    recorded = record(options.target, options.drafter, options.tokens, options.prompts)
    measured = {}
    if options.against:
        cells = json.loads(options.against.read_text(encoding="utf-8"))["cells"]
        measured = {(c["policy"], c["num_requests"]): c["ratio"] for c in cells}
        loads = sorted({n for _, n in measured})
        policies = [p for p in policies if any(p == q for q, _ in measured)]
    found: dict[str, dict[str, list[float]]] = {}
    for name in options.machine.split(","):
        rates: dict[str, list[float]] = {}
        for policy in policies:
            rates[policy] = [
                simulate(policy, machine(name, options), recorded, n, options.steps, options.noise) for n in loads
            ]
        found[name] = rates
        table = Table(title=f"{name}: tokens/s over plain decoding", title_justify="left")
        table.add_column("requests")
        for n in loads:
            table.add_column(str(n), justify="right")
        for policy, own in rates.items():
            ratios = [f"{r / plain:.2f}" for r, plain in zip(own, rates["off"], strict=True)]
            if name == "measured" and measured:
                ratios = [
                    f"{r} ({measured.get((policy, n), float('nan')):.2f})" for r, n in zip(ratios, loads, strict=True)
                ]
            table.add_row(policy, *ratios)
        console.print(table)
    if measured:
        console.print("in brackets: what the real engine did")
    if options.json:
        options.json.write_text(json.dumps({"requests": loads, "tokens_per_second": found}), encoding="utf-8")


def machine(name: str, options: argparse.Namespace) -> Capacity:
    if name != "measured":
        return MACHINES[name]()
    about = json.loads(options.capacity.read_text(encoding="utf-8"))["fingerprint"]
    return Capacity.load(options.capacity, about)  # wherever it was measured: it is simulated


if __name__ == "__main__":
    main()
