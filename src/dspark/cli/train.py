"""Train a drafter for a target: one recipe, or several side by side on the same batches.

    dspark train quick --target path/or/hub-id --data answers --out runs --dry-run
    dspark train quick --target path/or/hub-id --data answers --out runs

Texts come from `dspark data`. Without a GPU it trains on the CPU; with several, start it with torchrun:
torchrun --nproc-per-node 8 -m dspark train recipe.toml
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dspark.cli.models import add_threads, quiet_weights, set_threads
from dspark.cli.terminal import say

if TYPE_CHECKING:
    from dspark.target.target import Target
    from dspark.train.trainer import Trainer

_OVERRIDES = ("steps", "tokens_per_batch", "accumulate", "num_validation", "validate_every", "seed", "start_from")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipes",
        nargs="+",
        type=_recipe,
        metavar="RECIPE",
        help="quick (a first drafter for any target), or a TOML file with [drafter], [train], [loss], [run]",
    )
    places = parser.add_argument_group("where things are (they override the recipe's [run])")
    places.add_argument("--target", help="tiny, a folder or a hub id")
    places.add_argument("--data", help="folder written by `dspark data`")
    places.add_argument("--out", help="folder for the drafters, each in a folder named like its recipe")
    places.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the target (default: its own)")
    places.add_argument("--device", help="cpu, cuda, ... (default: the best there is)")
    training = parser.add_argument_group("training (they override the recipe's [train])")
    training.add_argument("--steps", type=int, help="optimiser steps")
    training.add_argument("--tokens-per-batch", type=int, help="prompts and padding included")
    training.add_argument("--accumulate", type=int, help="batches per step")
    training.add_argument("--num-validation", type=int, help="texts held out to judge drafters on")
    training.add_argument("--validate-every", type=int, help="steps between two validations")
    training.add_argument("--seed", type=int, help="of the held-out texts, the batches and the drawn weights")
    training.add_argument("--start-from", help="drafter of the same shape to go on from")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, if there is one")
    parser.add_argument(
        "--cache", type=Path, help="keep the target's states in this folder instead of making them anew"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what it would cost and bring, and stop")
    parser.add_argument("--tensorboard", action="store_true", help="event files beside the CSV files")
    add_threads(parser)


def _recipe(name: str) -> Path:
    """A file, or one that comes with the package, named without `.toml`: beside src/ in a clone, inside a wheel."""
    here = Path(__file__).resolve()
    shipped = [folder / "recipes" / f"{name}.toml" for folder in (here.parents[3], here.parents[1])]
    return next((path for path in shipped if path.is_file() and not Path(name).exists()), Path(name))


def run(args: argparse.Namespace) -> int:
    from dspark.train.distributed import join, leave
    from dspark.train.plan import make_plan
    from dspark.train.trainer import STATE, Trainer, refuse_to_overwrite

    set_threads(args)
    places = {name: getattr(args, name) for name in ("target", "data", "out", "dtype", "device")}
    plan = make_plan(args.recipes, places, {name: getattr(args, name) for name in _OVERRIDES})
    if not (args.resume or args.dry_run):
        refuse_to_overwrite(plan.out)
    rank, _ = join()
    try:
        target = _target(plan.target, plan.run.dtype, plan.run.device, rank)
        if args.dry_run:
            return _estimate(Trainer(plan, target))
        trainer = Trainer(plan, target, args.cache, tensorboard=args.tensorboard)
        if args.resume:
            found = trainer.resume()
            trainer.say(f"going on from step {trainer.progress['step']:.0f}" if found else "nothing to go on from")
        trainer.run()
    except KeyboardInterrupt:
        if (plan.out / STATE).exists():
            say(f"stopped; {plan.out} goes on from its last save with --resume")
        raise
    finally:
        leave()
    if rank == 0:
        for recipe in plan.recipes:
            say(f'{recipe.out} is ready: dspark generate "..." --target {plan.target} --drafter {recipe.out}')
    return 0


def _estimate(trainer: Trainer) -> int:
    from dspark.train.estimate import estimate

    for line in estimate(trainer):
        print(line, flush=True)
    return 0


def _target(name: str, dtype: str | None, device: str | None, rank: int) -> Target:
    import torch

    from dspark import load_target

    quiet_weights(name)
    if device is None and torch.cuda.is_available():
        device = f"cuda:{rank % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    return load_target(name, dtype=dtype, device=device)
