"""Measure what a drafter's checkpoint means for a target, and refuse one that would hardly ever be right.

    dspark doctor path/or/hub-id my_drafter

Exit code 1: it does not fit, it means something else than its config says, or it guesses no better than chance.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.cli.models import quiet_weights
from dspark.cli.terminal import print_json, progress
from dspark.errors import InvalidConfiguration

if TYPE_CHECKING:
    from dspark.checkpoints.doctor import Diagnosis
    from dspark.target.target import Target

SICK = 1
_PROMPTS = (
    "What does the word river mean?",
    "A shop sells pens at 3 dollars each. Ann buys 4 pens and pays with 20 dollars. How much change does she get?",
    "Write a Python function that returns the largest number in a list.",
    "How do I list all files in a folder, newest first?",
    "Hi, I would like to book a table for two tonight.",
    "What is the capital of Norway, and what is it known for?",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", help="tiny, a folder or a hub id")
    parser.add_argument(
        "drafter", metavar="DRAFTER", help="folder or hub id of a trained drafter; dspark, dflash, eagle3"
    )
    parser.add_argument("--prompts", metavar="FILE", help="one prompt per line, instead of a few general ones")
    parser.add_argument("--max-tokens", type=int, default=64, help="length of the answers measured on (default: 64)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--no-color", action="store_true", help="no colours (also: the NO_COLOR variable)")


def run(args: argparse.Namespace) -> int:
    from dspark.checkpoints import open_checkpoint
    from dspark.checkpoints.dialects import require_dialect
    from dspark.checkpoints.doctor import examine
    from dspark.cli.info import checkpoint_path

    prompts = _read_prompts(args.prompts)
    checkpoint = open_checkpoint(checkpoint_path(args.drafter))
    require_dialect(checkpoint.config, checkpoint.name)  # before a target is waited for
    with progress(f"loading {args.target}", args.no_color):
        from dspark import load_target

        quiet_weights(args.target)
        target = load_target(args.target)
    with progress(f"{args.target} writes {len(prompts)} answers", args.no_color):
        texts = _greedy_answers(target, prompts, args.max_tokens)
    diagnosis = examine(checkpoint, target, texts)
    if args.json:
        print_json(_as_json(diagnosis))
    else:
        _print(diagnosis, args.drafter)
    return SICK if diagnosis.problems else 0


def _read_prompts(path: str | None) -> list[str]:
    if path is None:
        return list(_PROMPTS)
    file = Path(path)
    if not file.is_file():
        raise InvalidConfiguration(f"{path} does not exist; expected a text file with one prompt per line")
    prompts = [line.strip() for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    if not prompts:
        raise InvalidConfiguration(f"{path} has no prompt; expected one per line")
    return prompts


def _greedy_answers(target: Target, prompts: list[str], max_tokens: int) -> list[tuple[list[int], int]]:
    from dspark import Engine, SamplingParams
    from dspark.engine.text import has_chat_template

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    generations = Engine(target).generate(prompts, params, raw=not has_chat_template(target.tokenizer))
    return [(g.prompt_token_ids + g.token_ids, len(g.prompt_token_ids)) for g in generations]


def _print(diagnosis: Diagnosis, name: str) -> None:
    from dspark.checkpoints.doctor import describe_reading

    if diagnosis.measurements:
        width = max(len(describe_reading(m.reading)) for m in diagnosis.measurements)
        print(f"  {'reading':<{width}}  tau   accepted at draft position 1, 2, ...")
    for m in diagnosis.measurements:
        mark = "*" if m.reading == diagnosis.claimed else " "
        shares = " ".join(f"{a:.2f}" for a in m.acceptance)
        print(f"{mark} {describe_reading(m.reading):<{width}}  {m.tau:.2f}  {shares}")
    if diagnosis.measurements:
        print("* what its config says")
    for note in diagnosis.notes:
        print(f"note: {note}")
    for problem in diagnosis.problems:
        print(f"{name}: {problem}")
    if not diagnosis.problems:
        print(f"{name} is what its config says")


def _as_json(diagnosis: Diagnosis) -> dict[str, Any]:
    return {
        "healthy": not diagnosis.problems,
        "claimed": vars(diagnosis.claimed),
        "readings": [{**vars(m.reading), "tau": m.tau, "acceptance": m.acceptance} for m in diagnosis.measurements],
        "problems": diagnosis.problems,
        "notes": diagnosis.notes,
    }
