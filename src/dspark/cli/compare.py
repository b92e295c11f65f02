"""Compare ways to decode on your prompts: which is fastest, by how much, and how sure that is.

    dspark compare none ngram dspark dspark,scheduler=fixed:3

Each is DRAFTER[,scheduler=NAME][,rule=NAME]; the first is the baseline. All decode the same prompts in turns, several
times. Intervals are 95 % ones over prompts, paired. With --gate, exit code 1: a configuration is worse than allowed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.cli.models import add_target, add_threads, check_names, open_target, set_threads
from dspark.cli.terminal import new_file, print_json, progress, quiet_drift, say
from dspark.errors import InvalidRequest

if TYPE_CHECKING:
    from dspark import Engine
    from dspark.evaluate.comparison import Choice, Comparison
    from dspark.evaluate.prompts import Sample
    from dspark.evaluate.runs import Run, Setup
    from dspark.evaluate.statistics import Interval
    from dspark.target.target import Target

REGRESSED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("setups", nargs="+", metavar="SETUP", help="DRAFTER[,scheduler=NAME][,rule=NAME]")
    models = parser.add_argument_group("models")
    add_target(models)
    models.add_argument("--compile", action="store_true", help="compile the models first")
    add_threads(models)
    work = parser.add_argument_group("work")
    work.add_argument("--prompts", type=int, default=24, metavar="N", help="built-in prompts to use (24)")
    work.add_argument(
        "--prompts-file", type=Path, metavar="FILE", help="one per line, or .jsonl with prompt and domain"
    )
    work.add_argument("--batch", type=int, default=1, metavar="B", help="prompts decoded together (1)")
    work.add_argument("--repeats", type=int, default=3, metavar="N", help="the median counts (3)")
    work.add_argument("--max-tokens", type=int, default=96, metavar="N", help="tokens per text (96)")
    work.add_argument("--temperature", type=float, default=0.0, metavar="X", help="default 0")
    work.add_argument("--seed", type=int, default=0, metavar="N", help="of the first text (0)")
    kept = parser.add_argument_group("regression")
    kept.add_argument("--save", type=new_file, metavar="FILE", help="keep the run of the last setup")
    kept.add_argument("--against", type=Path, metavar="FILE", help="a kept run is the baseline")
    kept.add_argument(
        "--gate",
        nargs="?",
        const="",
        metavar="FILE",
        help="fail on regressions: a TOML file with [speed], [tau], [same_text], each with at_least or max_drop "
        "(without FILE: 5 %% of speed, 2 %% of tau)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--no-color", action="store_true", help="no colours (also: the NO_COLOR variable)")


def run(args: argparse.Namespace) -> int:
    from dspark.evaluate import comparison
    from dspark.evaluate.runs import Run, Setup

    setups = [Setup.parse(text) for text in args.setups]
    _check(args, setups)
    gate = comparison.read_gate(Path(args.gate)) if args.gate else comparison.USUAL_GATE
    baseline = Run.load(args.against) if args.against else None
    runs = _runs(args, setups, baseline)
    if args.save:
        runs[-1].save(args.save)
    if baseline is None:
        baseline, *others = runs
    else:
        others = runs
    found = [comparison.compare(baseline, other) for other in others]
    choice = comparison.choose(runs) if len(runs) > 1 else None
    reasons = [r for c in found for r in comparison.failures(c, gate)] if args.gate is not None else []
    if args.json:
        print_json(_as_json(runs, found, choice, reasons))
    else:
        _report(args, baseline, runs, found, choice)
        for reason in reasons:
            print(f"REGRESSION: {reason}")
        if args.gate is not None and not reasons:
            print("no regression")
    return REGRESSED if reasons else 0


def _check(args: argparse.Namespace, setups: list[Setup]) -> None:
    for name in ("batch", "repeats", "max_tokens", *(("threads",) if args.threads is not None else ())):
        if getattr(args, name) < 1:
            raise InvalidRequest(f"--{name.replace('_', '-')} must be 1 or more; got {getattr(args, name)}")
    if len({s.name for s in setups}) < len(setups):
        raise InvalidRequest("each setup can take part once")
    if len(setups) < 2 and not (args.against or args.save):
        raise InvalidRequest("comparing takes two setups, as in `none dspark`, or a kept run (--against FILE)")
    if not args.prompts_file:
        _require_two_batches(args, args.prompts)
    for setup in setups:
        check_names(args.target, setup.drafter, setup.scheduler, setup.rule)


def _require_two_batches(args: argparse.Namespace, num_prompts: int) -> None:
    if num_prompts < 2 * args.batch:
        raise InvalidRequest(f"an interval needs two batches; {num_prompts} prompts make fewer of {args.batch}")


def _runs(args: argparse.Namespace, setups: list[Setup], baseline: Run | None) -> list[Run]:
    from dspark.evaluate.comparison import require_same_work
    from dspark.evaluate.runs import run_all, work_of
    from dspark.types import SamplingParams

    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens, seed=args.seed)
    with progress(f"loading {args.target}", args.no_color):
        target, engines = _engines(args, setups)
        samples, raw = _samples(args, target)
    _require_two_batches(args, len(samples))
    if baseline is not None:  # before minutes are spent on it
        require_same_work(baseline, setups[0].name, work_of(samples, params, args.batch, raw))
    doing = f"decoding {len(samples)} prompts {args.repeats} times with {len(setups)} setups"
    with progress(doing, args.no_color), quiet_drift():
        return run_all(engines, _facts(args, target), samples, params, args.batch, args.repeats, raw)


def _engines(args: argparse.Namespace, setups: list[Setup]) -> tuple[Target, dict[str, Engine]]:
    from dspark import Engine, load_drafter

    set_threads(args)
    target = open_target(args)
    drafters = {name: load_drafter(name, target) for name in {s.drafter for s in setups}}
    return target, {
        s.name: Engine(
            target,
            drafters[s.drafter],
            scheduler=s.scheduler,
            rule=s.rule,
            compile=args.compile,
            max_num_seqs=args.batch,
        )
        for s in setups
    }


def _facts(args: argparse.Namespace, target: Target) -> dict[str, str]:
    """What seconds of plain decoding are true of here; drafters are what is compared."""
    from dspark.drafters.none import NoDrafter
    from dspark.engine.machine import fingerprint

    return fingerprint(target, NoDrafter(), args.compile)


def _samples(args: argparse.Namespace, target: Target) -> tuple[list[Sample], bool]:
    from dspark.evaluate import prompts

    built_in, raw = prompts.fitting(target.tokenizer, target.vocab_size, args.prompts)
    return prompts.from_file(args.prompts_file) if args.prompts_file else [prompts.Sample(p) for p in built_in], raw


def _report(
    args: argparse.Namespace, baseline: Run, runs: list[Run], found: list[Comparison], choice: Choice | None
) -> None:
    by_name = {c.name: c for c in found}
    width = max(len(r.name) for r in [baseline, *runs])
    what = f"{len(runs[0].units)} " + (
        "prompts, one at a time" if args.batch == 1 else f"batches of {args.batch} prompts"
    )
    facts = runs[0].facts
    print(
        f"{what}, {args.repeats} times with each setup in turn, temperature {args.temperature:g}; "
        f"{args.target}, {facts['dtype']}, {facts['hardware']}, threads: {facts['threads']}"
    )
    print(f"{'':{width}}  tokens/s    tau")
    for r in runs if baseline in runs else [baseline, *runs]:
        line = f"{r.name:{width}}  {r.tokens_per_second:8.0f}  {r.tau:5.2f}"
        print(line + (f"  {_described(by_name[r.name])}" if r is not baseline else "  (baseline)"))
    for c in found:
        for domain, interval in c.speed_by_domain.items():
            print(f"  {c.name} on {domain}: {_shown(interval)}")
    if args.against and any(c.speed is None for c in found):
        say("the kept run was timed on another machine or with other versions, so speed is not judged")
    if choice is not None:
        print(_chosen(choice))


def _shown(interval: Interval) -> str:
    return f"{interval.value:.2f}x ({interval.low:.2f} to {interval.high:.2f})"


def _described(found: Comparison) -> str:
    speed = found.verdict if found.speed is None else f"{_shown(found.speed)} {found.verdict}"
    return f"{speed}, {found.same_text:.0%} same text"


def _chosen(choice: Choice) -> str:
    if choice.rivals:
        return f"undecided: {' or '.join([choice.best, *choice.rivals])}; more prompts or repeats would tell"
    assert choice.lead is not None
    return f"best: {choice.best}, {_shown(choice.lead)} of the next"


def _as_json(runs: list[Run], found: list[Comparison], choice: Choice | None, reasons: list[str]) -> dict[str, Any]:
    return {
        "facts": runs[0].facts,
        "runs": [{"name": r.name, "tokens_per_second": r.tokens_per_second, "tau": r.tau} for r in runs],
        "comparisons": [c.as_json() for c in found],
        "best": None if choice is None else choice.best,
        "rivals": [] if choice is None else list(choice.rivals),
        "regressions": reasons,
    }
