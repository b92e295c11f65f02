"""Say what a target or drafter folder is, and whether the two fit.

    dspark info path/or/hub-id
    dspark info my_drafter --target path/or/hub-id

Exit code 1: the drafter does not fit the target. Each mismatch is named.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dspark.cli.models import quiet_weights
from dspark.cli.terminal import print_json, progress
from dspark.errors import InvalidRequest

DOES_NOT_FIT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="folder or hub id of a target or a drafter; tiny, dspark, ...")
    parser.add_argument("--target", help="does the drafter at PATH fit this target? tiny, a folder or a hub id")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--no-color", action="store_true", help="no colours (also: the NO_COLOR variable)")


def run(args: argparse.Namespace) -> int:
    from dspark.checkpoints import describe

    path = checkpoint_path(args.path)
    facts = describe(path)
    problems = None if args.target is None else _problems(path, args)
    if args.json:
        fit = {} if problems is None else {"target": args.target, "fits": not problems, "problems": problems}
        print_json({**facts, **fit})
    else:
        _print_table(dict(_flat(facts)))
        if problems is not None:
            as_draft = ", as a draft model" if facts["kind"] == "target" else ""
            print(f"does not fit {args.target}{as_draft}:" if problems else f"fits {args.target}{as_draft}")
            for problem in problems or ():
                print(f"  - {problem}")
    return DOES_NOT_FIT if problems else 0


def checkpoint_path(name: str) -> str:
    """The names that `generate --drafter` knows for the embedded pair are folders too."""
    from dspark.drafters.loading import EMBEDDED, WITHOUT_CHECKPOINT
    from dspark.target.loading import embedded_pair_folder

    if name in WITHOUT_CHECKPOINT and not Path(name).exists():
        raise InvalidRequest(f"{name} is a way to draft without a checkpoint, which fits every target: nothing to read")
    return str(embedded_pair_folder("tiny") / name) if name in EMBEDDED else name


def _problems(path: str, args: argparse.Namespace) -> list[str]:
    with progress(f"loading {args.target}", args.no_color):
        from dspark import load_target
        from dspark.checkpoints import check_fit

        quiet_weights(args.target)
        return list(check_fit(path, load_target(args.target)))


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """One line per fact; nested facts carry the name of what they belong to."""
    for name, fact in facts.items():
        label = prefix + name.replace("_", " ")
        if isinstance(fact, Mapping):
            yield from _flat(fact, f"{label} ")
        elif fact is not None:
            yield label, _readable(fact)


def _readable(fact: Any) -> str:
    if isinstance(fact, bool):
        return "yes" if fact else "no"
    if isinstance(fact, int):
        return f"{fact:,}"
    if isinstance(fact, (list, tuple)):
        return ", ".join(str(item) for item in fact) or "none"
    return str(fact)


def _print_table(rows: Mapping[str, str]) -> None:
    width = max((len(label) for label in rows), default=0)
    for label, fact in rows.items():
        print(f"{label:<{width}}  {fact}")
