"""The questions that benchmarks/calibration.py asks of replays."""

from __future__ import annotations

import copy
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.recorded import Text, rounds_of
from benchmarks.replay import Calibrated, Costs, Knee, Knowing, Replay, Steps
from dspark.budget.beliefs import LiveBeliefs, LiveSettings
from dspark.budget.calibration import Calibration, fit_affine, fit_temperatures
from dspark.budget.capacity import Capacity
from dspark.budget.reliability import expected_calibration_error
from dspark.budget.throughput import Optimal
from dspark.types import Load

LOADS = {"low": 1, "middle": 8, "high": 32}  # requests side by side on this machine
GPU_LOADS = {"low": 16, "middle": 64, "high": 192}  # and on a large GPU
KINDS = ("raw", "STS", "STS + offset", "live", "hindsight", "all-knowing")
SETTINGS = ("in-domain", "shifted", "after a switch", "overconfident")
MEMORIES = (100, 300, 1000, 3000, 10000)
WINDOW = 20  # steps
_AFTER_SWITCH = 200  # steps
_SLOWER = 2.0  # how much longer steps take after the machine has changed
_NOISE = 0.1  # of a step's seconds


class Bench:
    """Texts to fit on and to serve, what steps cost, and how much work to do.

    Shifted traffic is `away`, while calibrations have seen `home` alone. Overconfident: the same drafts from a drafter
    that thinks better of them, which calibrations have not seen either.
    """

    def __init__(
        self,
        texts: Sequence[Text],
        capacity: Capacity,
        num_steps: int = 300,
        num_repeats: int = 6,
        ends: float = math.inf,
        say: Callable[[str], Any] = lambda _: None,
    ) -> None:
        self.capacity, self.num_steps, self.num_repeats = capacity, num_steps, num_repeats
        self.ends, self.say = ends, say
        self.length = len(texts[0].confidence[0])
        self.domains = sorted({text.domain for text in texts})
        self.home, self.away = self.domains[-1], self.domains[0]
        self.fitting, self.serving = {}, {}
        for domain in self.domains:
            own = [text for text in texts if text.domain == domain]
            self.fitting[domain], self.serving[domain] = own[::2], own[1::2]
        everything = rounds_of([t for own in self.fitting.values() for t in own])
        at_home = rounds_of(self.fitting[self.home])
        self.fitted = {
            "in-domain": {"STS": fit_temperatures(everything), "STS + offset": fit_affine(everything)},
            "shifted": {"STS": fit_temperatures(at_home), "STS + offset": fit_affine(at_home)},
        }

    def served(self, setting: str, is_before: bool = False) -> list[Text]:
        """The texts of a setting; before a switch those of home."""
        if setting in ("shifted", "after a switch"):
            return self.serving[self.home if is_before and setting == "after a switch" else self.away]
        fewest = min(map(len, self.serving.values()))
        mixed = [text for own in self.serving.values() for text in own[:fewest]]
        return [overconfident(text) for text in mixed] if setting == "overconfident" else mixed

    def repeats(self) -> Iterable[int]:
        """Numbers of repeats, while there is time for another one."""
        longest = 0.0
        for repeat in range(self.num_repeats):
            began = time.monotonic()
            if repeat and began + longest > self.ends:
                return
            yield repeat
            longest = max(longest, time.monotonic() - began)

    def machines(self) -> dict[str, tuple[Costs, dict[str, int]]]:
        return {"this machine": (self.capacity, LOADS), "large GPU": (Knee(), GPU_LOADS)}

    def fixed(self) -> Costs:
        """What steps cost here, which no replay changes."""
        return _Fixed(self.capacity)

    def biases(self) -> dict[str, dict[str, list[float]]]:
        """Stated less observed survival by kind, by domain, by position; at middle load, in-domain."""
        found: dict[str, dict[str, list[float]]] = {}
        for kind in ("raw", "STS", "STS + offset", "live"):
            self.say(f"bias, {kind}")
            gaps = {domain: _Mean(self.length) for domain in self.domains}
            for repeat in self.repeats():
                replay = Replay(
                    self.beliefs(kind, "in-domain"), Optimal(self.fixed()), self.fixed(), LOADS["middle"], repeat
                )
                steps = replay.serve(self.served("in-domain"), 2 * self.num_steps)
                for s in range(self.num_steps, len(steps.tokens)):
                    for b, domain in enumerate(steps.domains[s]):
                        gap = steps.believed[s][b] - steps.happened[s][b].float()
                        gaps[domain].add(gap, steps.known[s][b])
            found[kind] = {domain: mean.values() for domain, mean in gaps.items()}
        return found

    def beliefs(self, kind: str, setting: str, memory: float | None = None) -> Any:
        """hindsight: a calibration fitted to the very texts that are served."""
        fitted = self.fitted["in-domain" if setting in ("in-domain", "overconfident") else "shifted"]
        if kind == "live":
            settings = LiveSettings() if memory is None else LiveSettings(memory=memory)
            return LiveBeliefs(fitted["STS + offset"], self.length, settings)
        if kind == "hindsight":
            return Calibrated(fit_affine(rounds_of(self.served(setting))))
        if kind == "all-knowing":
            return Knowing()
        calibration: Calibration | None = fitted.get(kind)
        return Calibrated(calibration)


class _Fixed:
    """Costs that are asked and learn nothing."""

    def __init__(self, costs: Costs) -> None:
        self.seconds, self.draft_seconds = costs.seconds, costs.draft_seconds


class _Mean:
    """Of values [K] where they are known."""

    def __init__(self, length: int) -> None:
        self.total, self.count = torch.zeros(length), torch.zeros(length)

    def add(self, values: Tensor, known: Tensor) -> None:
        self.total += values * known
        self.count += known

    def values(self) -> list[float]:
        return [round(v, 4) for v in (self.total / self.count.clamp_min(1)).tolist()]


def overconfident(text: Text) -> Text:
    """The same text if its drafter had stated other confidences: log-odds half as large again, and one more."""
    stated = torch.sigmoid(1.5 * torch.logit(torch.tensor(text.confidence).clamp(1e-4, 1 - 1e-4)) + 1.0)
    return replace(text, confidence=stated.tolist())


def worth(bench: Bench) -> list[dict[str, Any]]:
    """Tokens per second and tau of each kind of beliefs, by machine, load and setting; ratios to raw confidences."""
    cells: dict[tuple[str, str, str, str], list[dict[str, float]]] = {}
    for repeat in bench.repeats():
        for machine, (costs, loads) in bench.machines().items():
            for load, num_requests in loads.items():
                for setting in SETTINGS:
                    bench.say(f"worth, repeat {repeat + 1}: {machine}, {num_requests} requests, {setting}")
                    runs = _worth_of(bench, costs, num_requests, setting, repeat)
                    for kind, run in runs.items():
                        cells.setdefault((machine, load, setting, kind), []).append(run)
    return [
        {
            "machine": machine,
            "load": load,
            "requests": bench.machines()[machine][1][load],
            "setting": setting,
            "kind": kind,
            **{name: statistics.fmean(run[name] for run in runs) for name in runs[0]},
            "error": _standard_error([run["ratio"] for run in runs]),
        }
        for (machine, load, setting, kind), runs in cells.items()
    ]


def _worth_of(bench: Bench, costs: Costs, num_requests: int, setting: str, repeat: int) -> dict[str, dict[str, float]]:
    """The same texts in the same order for all kinds."""
    num_steps = max(bench.num_steps // 5, min(400, 8 * bench.num_steps // num_requests))
    if setting == "after a switch":
        num_steps = min(100, num_steps)
    found: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        fixed = _Fixed(costs)
        replay = Replay(bench.beliefs(kind, setting), Optimal(fixed), fixed, num_requests, repeat)
        warm_up = max(bench.num_steps // 5, 800 // num_requests) if kind == "live" else 0  # the others learn nothing
        replay.serve(bench.served(setting, is_before=True), warm_up)
        replay.random = random.Random(1000 + repeat)
        steps = replay.serve(bench.served(setting), num_steps)
        rate = steps.rate(warm_up)
        found[kind] = {"rate": rate, "tau": steps.tau(warm_up), "verified": steps.verified_length(warm_up)}
        found[kind]["error of calibration"] = float(calibration_error(steps, warm_up))
    for run in found.values():
        run["ratio"] = run["rate"] / found["raw"]["rate"]
    return found


def calibration_error(steps: Steps, first: int, end: int | None = None) -> float:
    """Expected calibration error of survival, position by position; each counts as often as it was seen."""
    return pooled_error([steps], first, end)


def pooled_error(all_steps: Sequence[Steps], first: int, end: int | None, happened: Any = None) -> float:
    believed, known, outcomes = (
        torch.cat([value for steps in all_steps for value in getattr(steps, name)[first:end]])
        for name in ("believed", "known", "happened")
    )
    if happened is not None:
        outcomes = happened(believed)
    num_known = known.sum(0)
    errors = [
        float(expected_calibration_error(believed[rows, k], outcomes[rows, k])) * int(num)
        for k, (rows, num) in enumerate(zip(known.unbind(1), num_known, strict=True))
        if num
    ]
    return sum(errors) / max(1, int(num_known.sum()))


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def recovery(bench: Bench) -> dict[str, Any]:
    """Errors around a sudden switch of traffic and, at the same step, of machine speed; in windows of steps."""
    num_before = 15 * WINDOW
    edges = range(num_before - 5 * WINDOW, num_before + _AFTER_SWITCH + WINDOW, WINDOW)
    switches = {
        f"{bench.home} to {bench.away}": bench.serving[bench.away],
        "drafter turns overconfident": [overconfident(text) for text in bench.serving[bench.home]],
    }
    curves: dict[str, dict[str, list[float]]] = {}
    for name, after in switches.items():
        curves[name] = {}
        for kind in ("raw", "STS + offset", "live"):
            runs = []
            for repeat in bench.repeats():
                bench.say(f"recovery, {name}, {kind}, repeat {repeat + 1}")
                runs.append(_switch(bench, bench.beliefs(kind, "after a switch"), repeat, num_before, after))
            all_steps = [steps for steps, _ in runs]
            curves[name][kind] = [pooled_error(all_steps, e, e + WINDOW) for e in edges]
        # What beliefs would show that are right on average, for want of more drafts.
        curves[name]["chance"] = [pooled_error(all_steps, e, e + WINDOW, drawn) for e in edges]
    cost = [
        statistics.fmean(abs(steps.predicted[s] / true[s] - 1) for steps, true in runs for s in range(e, e + WINDOW))
        for e in edges
    ]
    return {"steps": [e + WINDOW // 2 - num_before for e in edges], "error": curves, "cost error": cost}


def drawn(believed: Tensor) -> Tensor:
    """Outcomes as if beliefs were right."""
    uniform = torch.rand(len(believed), 1, generator=torch.Generator().manual_seed(0))
    return uniform < believed


def _switch(
    bench: Bench, beliefs: Any, repeat: int, num_before: int, after: Sequence[Text]
) -> tuple[Steps, list[float]]:
    """Steps at middle load and their true price, which is measured with noise; the machine slows down at the switch."""
    costs, noise, is_slow, true = copy.deepcopy(bench.capacity), random.Random(repeat), False, list[float]()

    def seconds(num_tokens: int, load: Load) -> float:
        usual = float(bench.capacity.seconds(np.array([num_tokens]), load.num_requests, load.context_tokens)[0])
        true.append(usual * (_SLOWER if is_slow else 1.0))
        return true[-1] * noise.lognormvariate(0, _NOISE)

    replay = Replay(beliefs, Optimal(costs), costs, LOADS["middle"], repeat, seconds)
    replay.serve(bench.serving[bench.home], num_before)
    is_slow = True
    return replay.serve(after, _AFTER_SWITCH + WINDOW), true


def forgetting(bench: Bench) -> list[dict[str, float]]:
    """How fast live calibration may forget: errors before and after a switch, by rounds after which 1/e is left."""
    found = []
    num_before = 20 * WINDOW
    for memory in MEMORIES:
        all_steps = []
        for repeat in bench.repeats():
            bench.say(f"forgetting, memory {memory}, repeat {repeat + 1}")
            beliefs = bench.beliefs("live", "after a switch", memory)
            all_steps.append(_switch(bench, beliefs, repeat, num_before, bench.serving[bench.away])[0])
        windows = range(num_before, num_before + _AFTER_SWITCH, WINDOW)
        after = [pooled_error(all_steps, e, e + WINDOW) for e in windows]
        found.append(
            {
                "memory": memory,
                "before": pooled_error(all_steps, num_before - 10 * WINDOW, num_before),
                "chance": pooled_error(all_steps, num_before - 10 * WINDOW, num_before, drawn),
                "first 100 steps": statistics.fmean(after[:5]),
                "second 100 steps": statistics.fmean(after[5:]),
                "rate before": statistics.fmean(s.rate(num_before - 10 * WINDOW, num_before) for s in all_steps),
                "rate after": statistics.fmean(s.rate(num_before) for s in all_steps),
            }
        )
    return found
