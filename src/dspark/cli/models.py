"""The options that say which models to load and where they run, and the loading: the same for every verb."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.errors import InvalidRequest

if TYPE_CHECKING:
    from dspark.target.target import Target

Arguments = argparse._ActionsContainer  # a parser, or a group of its options


def add_target(arguments: Arguments) -> None:
    """Which model, and how it is held."""
    arguments.add_argument("--target", default="tiny", help="tiny (the embedded one, default), a folder or a hub id")
    add_placement(arguments)


def add_placement(arguments: Arguments) -> None:
    """How the models are held."""
    arguments.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the target's own")
    arguments.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the best there is)")


def add_hub(arguments: Arguments) -> None:
    """What a target from the hub may need said."""
    arguments.add_argument("--revision", help="branch, tag or commit of a target from the hub")
    arguments.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the target")


def add_threads(arguments: Arguments) -> None:
    """On how many cores."""
    arguments.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")


def set_threads(args: argparse.Namespace) -> None:
    """As `--threads` says."""
    import torch

    if args.threads is not None:
        if args.threads < 1:
            raise InvalidRequest(f"--threads must be 1 or more; got {args.threads}")
        torch.set_num_threads(args.threads)


def add_overlap(arguments: Arguments) -> None:
    """Whether the host goes ahead."""
    arguments.add_argument(
        "--overlap", action="store_true", help="on a GPU, with --drafter none or --scheduler fixed:N: wait for it less"
    )


def check_overlap(args: argparse.Namespace) -> None:
    """Raise InvalidRequest where --overlap cannot go ahead, before anybody waits for a model to load."""
    if args.overlap and drafter_name(args) != "none" and not (args.scheduler or "auto").startswith("fixed"):
        raise InvalidRequest(
            "--overlap cannot wait for what a scheduler says of drafts: add --drafter none or --scheduler fixed:7"
        )
    if args.overlap and args.rule != "coupled":
        raise InvalidRequest(f"--overlap goes with --rule coupled; got {args.rule}")


def check_names(target: str, drafter: str, scheduler: str, rule: str) -> None:
    """Raise InvalidConfiguration for names that mean nothing, before anybody waits for a model to load."""
    from dspark.budget.capacity import Capacity
    from dspark.budget.schedulers import make_scheduler
    from dspark.drafters.loading import check_name
    from dspark.sampling import KeyedDraws
    from dspark.verify import make_rule

    make_scheduler(scheduler, Capacity(), make_rule(rule, KeyedDraws(vocab_size=1)).allows_anticipation)
    check_name(drafter, target)


def open_target(args: argparse.Namespace, dtype: str | None = None, deterministic: bool = False) -> Target:
    """The target of these options; `dtype` in place of theirs."""
    from dspark import load_target

    if deterministic and getattr(args, "compile", False):
        raise InvalidRequest("--deterministic runs uncompiled: leave out one of --deterministic and --compile")
    quiet_weights(args.target)
    of_hub: dict[str, Any] = {"revision": args.revision} if getattr(args, "revision", None) else {}
    if getattr(args, "trust_remote_code", False):
        of_hub["trust_remote_code"] = True
    return load_target(args.target, dtype or args.dtype, args.device, deterministic=deterministic, **of_hub)


def drafter_name(args: argparse.Namespace) -> str:
    """The drafter that was asked for, or the target's own."""
    return args.drafter or ("dspark" if args.target == "tiny" else "none")


def quiet_weights(target: str) -> None:
    """No bars for reading weights from this machine: the spinner says it. A download from the hub keeps its bars."""
    if target == "tiny" or Path(target).exists():
        from transformers.utils import logging

        logging.disable_progress_bar()
