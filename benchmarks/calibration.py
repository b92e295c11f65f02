"""What is calibration worth? The same scheduler with raw, calibrated, live and all-knowing confidences.

    python benchmarks/calibration.py --quick
    python benchmarks/calibration.py --data DATA --recipe recipes/tiny/text.toml --json calibration.json --plot calibration

`--plot PREFIX` writes PREFIX-worth.png and PREFIX-recovery.png.

Drafts are recorded once from the real engine, at every token of every text, and replayed with the measured cost of
steps. Half of the texts of each domain fit the calibrations, the others are served.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Run as a file, this folder would come first on the path and its modules could shadow others.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.console import Console

from benchmarks import calibration_report as report
from benchmarks import plot, prompts, recorded
from benchmarks.calibration_trials import LOADS, Bench, forgetting, recovery, worth
from benchmarks.real_check import check
from benchmarks.recorded import Text
from dspark import Engine, SamplingParams, load_drafter, load_target
from dspark.budget.capacity import Capacity
from dspark.engine.measuring import Grid, measure
from dspark.target.target import Target
from dspark.types import Drafter


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--target", default="tiny")
    add("--drafter", default="dspark")
    add("--dtype", default="float32", help="(default: float32, in which texts do not depend on their company)")
    add("--prompts", type=Path, help="a .jsonl file or a folder of them (default: a small set of our own)")
    add("--data", type=Path, help="instead of --prompts: a training data folder, whose held-out 2 %% are asked")
    add("--recipe", type=Path, help="TOML with the sources of --data, their domains and shares")
    add("--per-domain", type=int, default=64, help="texts of each domain (default 64)")
    add("--tokens", type=int, default=128, help="of each text at most (default 128)")
    add("--records", type=Path, metavar="FILE", help="recorded drafts: read if it exists, else written")
    add("--capacity", type=Path, metavar="FILE", help="of `dspark profile --output FILE` (default: measured first)")
    add("--steps", type=int, default=300, help="of each replay (default 300)")
    add("--repeats", type=int, default=6, help="replays of each kind (default 6)")
    add("--minutes", type=float, help="begin no repeat that would not end in this time")
    add("--threads", type=int, help="(default: torch's choice)")
    add("--quick", action="store_true", help="fewer texts, steps and repeats: a minute or two")
    add("--no-check", action="store_true", help="leave out the real engine")
    add("--json", type=Path, metavar="FILE")
    add("--plot", type=Path, metavar="PREFIX", help="two pictures; needs matplotlib")
    options = parser.parse_args(arguments)
    if options.quick:
        options.per_domain, options.tokens = min(options.per_domain, 48), min(options.tokens, 64)
        options.steps, options.repeats = min(options.steps, 20), min(options.repeats, 2)
    return options


def asked(options: argparse.Namespace, tokenizer: Any) -> list[tuple[str, list[int]]]:
    """(domain, token ids) of what is asked; a small set is asked again and again, under other seeds."""
    if options.data:
        from dspark.train.held_out import choose, questions_of, sources_of

        questions = choose(questions_of(options.data, sources_of(options.recipe) if options.recipe else ()), 10**6)
        chosen = [prompts.Prompt(domain, text) for domain, text in questions]
    else:
        chosen = prompts.load(options.prompts) if options.prompts else prompts.built_in()
    read = prompts.encode(chosen, tokenizer, 288)
    by_domain = {p.domain: [q for q in read if q.domain == p.domain] for p in read}
    several = [of[i % len(of)] for of in by_domain.values() for i in range(options.per_domain)]
    return [(p.domain, list(p.token_ids)) for p in several]


def texts_of(options: argparse.Namespace, models: Callable[[], tuple[Target, Drafter]]) -> list[Text]:
    if options.records and options.records.exists():
        return recorded.load(options.records)
    target, drafter = models()
    params = SamplingParams(temperature=1.0, max_tokens=options.tokens, seed=0)
    texts = recorded.record(target, drafter, asked(options, target.tokenizer), params)
    if options.records:
        recorded.save(options.records, texts)
    return texts


def capacity_of(options: argparse.Namespace, models: Callable[[], tuple[Target, Drafter]]) -> Capacity:
    if options.capacity:
        about = json.loads(options.capacity.read_text(encoding="utf-8"))["fingerprint"]
        return Capacity.load(options.capacity, about)
    engine = Engine(*models(), "fixed:7", capacity=Capacity())
    contexts = (64,) if options.quick else (64, 192)
    measure(engine, Grid(requests=tuple(LOADS.values()), contexts=contexts, repeats=5, seconds=40))
    return engine.capacity


def main(arguments: Sequence[str] | None = None) -> None:
    began = time.monotonic()
    options = parse(arguments)
    logging.getLogger("dspark.budget").setLevel(logging.ERROR)  # traffic is switched on purpose
    if options.plot:
        plot.require_matplotlib()
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else 150)
    loaded: list[tuple[Target, Drafter]] = []

    def models() -> tuple[Target, Drafter]:
        if not loaded:
            target = load_target(options.target, dtype=options.dtype)
            loaded.append((target, load_drafter(options.drafter, target)))
        return loaded[0]

    ends = began + 60 * options.minutes if options.minutes else float("inf")
    with console.status("recording") as status:
        texts, capacity = texts_of(options, models), capacity_of(options, models)
        bench = Bench(texts, capacity, options.steps, options.repeats, ends, status.update)
        found: dict[str, Any] = {
            "texts": len(texts),
            "recovery": recovery(bench),
            "forgetting": forgetting(bench),
            "bias": bench.biases(),
            "worth": worth(bench),  # last, because it takes as many repeats as there is time for
        }
        if not options.no_check:
            status.update("the real engine")
            read = asked(options, models()[0].tokenizer)
            found["check"] = check(*models(), bench, read, texts, options.tokens)
    report.show(console, found)
    console.print(f"{len(texts)} texts, {time.monotonic() - began:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if options.plot:
        report.save_plots(options.plot, found)


if __name__ == "__main__":
    main()
