"""Measure what a step costs on this machine, for schedulers that weigh tokens against seconds.

    dspark profile --target path/or/hub-id --drafter my_drafter

Kept where every later run with the same models, dtype, threads and versions finds it. Runs without it learn the same
from their first steps.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from dspark.cli.generate import loading
from dspark.cli.models import add_target, add_threads, drafter_name, open_target, set_threads
from dspark.cli.terminal import new_file, print_json, progress, say
from dspark.errors import InvalidRequest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument("--drafter", help="as for generate (default: dspark for tiny, otherwise none)")
    parser.add_argument("--compile", action="store_true", help="of compiled models")
    add_threads(parser)
    parser.add_argument("--requests", default="1,2,4,8,16,32", help="side by side (default 1,2,4,8,16,32)")
    parser.add_argument("--contexts", default="32,512", help="tokens that each has read (default 32,512)")
    parser.add_argument("--seconds", type=float, default=30.0, help="begin nothing new after so long (default 30)")
    parser.add_argument("--output", type=new_file, metavar="FILE", help="write here and not to the usual place")
    parser.add_argument("--sps", type=new_file, metavar="FILE", help="also write steps per second in SGLang's form")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--no-color", action="store_true", help="no colours (also: the NO_COLOR variable)")


def run(args: argparse.Namespace) -> int:
    requests, contexts = _numbers("requests", args.requests, 1), _numbers("contexts", args.contexts, 1)
    if not args.seconds > 0:
        raise InvalidRequest(f"--seconds must be more than 0; got {args.seconds:g}")
    with progress(loading(args), args.no_color):
        engine = _engine(args, max(requests))
        from dspark.budget.capacity import usual_path
        from dspark.engine.measuring import Grid, measure
    path = args.output or usual_path(engine.capacity.fingerprint)
    path.parent.mkdir(parents=True, exist_ok=True)  # asked before anything is measured
    with progress("measuring", args.no_color):
        num_steps = measure(engine, Grid(requests, contexts, seconds=args.seconds))
    if not num_steps:
        raise InvalidRequest(
            f"no step of {args.requests} requests with {args.contexts} tokens each could be measured: the cache of "
            f"{args.target} has {engine.target.num_free_slots} slots, and its texts {engine.max_length} tokens"
        )
    engine.capacity.save(path)
    read = tuple(dict.fromkeys(min(context, engine.max_length) for context in contexts))  # longer ones were cut
    rows = _rows(engine, requests, read)
    if args.sps:
        table = engine.capacity.as_sps(max(requests) * (1 + engine.drafter.length), max(requests))
        args.sps.write_text(json.dumps(table), encoding="utf-8")
    if args.json:
        print_json({"file": str(path), "steps": num_steps, "rows": rows})
        return 0
    _print(rows)
    say(f"{num_steps} steps measured, kept in {path}")
    if args.sps:
        say(f"steps per second for SGLang in {args.sps}")
    return 0


def _numbers(name: str, text: str, least: int) -> tuple[int, ...]:
    try:
        numbers = tuple(int(n) for n in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < least:
        raise InvalidRequest(f"--{name} takes numbers of {least} or more, separated by commas; got {text!r}")
    return numbers


def _engine(args: argparse.Namespace, max_requests: int) -> Any:
    from dspark import Engine, load_drafter
    from dspark.budget.capacity import Capacity
    from dspark.engine.machine import fingerprint

    set_threads(args)
    target = open_target(args)
    drafter = load_drafter(drafter_name(args), target)
    anew = Capacity(fingerprint(target, drafter, args.compile))
    return Engine(target, drafter, compile=args.compile, max_num_seqs=max_requests, capacity=anew)


def _rows(engine: Any, requests: tuple[int, ...], contexts: tuple[int, ...]) -> list[dict[str, float]]:
    import numpy as np

    rows = []
    for context in contexts:
        for num in requests:
            lengths = sorted({0, 1, engine.drafter.length // 2, engine.drafter.length})
            sizes = np.array([num * (1 + length) for length in lengths])
            seconds = engine.capacity.seconds(sizes, num, num * context)
            row = {"requests": num, "context": context, "draft": engine.capacity.draft_seconds(num, num * context)}
            rows.append(row | {f"verify {n}": float(s) for n, s in zip(lengths, seconds, strict=True)})
    return rows


def _print(rows: list[dict[str, float]]) -> None:
    """Milliseconds of drafting, and of steps by how many draft tokens per request they verify."""
    names = list(rows[0])
    print("milliseconds: of drafting, and of a step in which the target verifies 0, 1, ... draft tokens per request")
    print("  ".join(f"{name:>9}" for name in names))
    for row in rows:
        values = [f"{row[n]:.0f}" if n in ("requests", "context") else f"{1000 * row[n]:.2f}" for n in names]
        print("  ".join(f"{value:>9}" for value in values))
