"""Drafters against each other: equal texts, batches, steps and width of features; tau at T = 1 on held-out prompts.

    python -m benchmarks.drafters --texts runs/tiny/text --data DATA --out runs/compare --seeds 3 --minutes 60

All recipes of recipes/compare (or --recipes) are trained side by side on the same batches, once per seed. Then the target
answers held-out prompts, the same for everyone, and every drafter is walked through the answers from round to
round (dspark.train.acceptance: exactly what decoding would have done), for every length of draft up to the block.

A seed has a folder, in it a folder for each drafter. What is finished is not done again, and what was interrupted goes on.
DATA is a data folder as recipes/tiny/text.toml describes it; of it, the last 2 % of every source are the prompts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import dspark
from benchmarks.drafter_report import BASELINES, save_plots, table
from benchmarks.drafter_results import RESULTS, Comparison, Measured, read_results
from dspark.errors import InvalidConfiguration
from dspark.target.loading import resolve
from dspark.target.target import Target
from dspark.train.acceptance import held_out_prompts, load_guesser, matched_answers, walk
from dspark.train.plan import Plan, make_plan
from dspark.train.regenerate import RegenerateSettings
from dspark.train.settings import read_recipe
from dspark.train.trainer import Trainer

RECIPES = Path(__file__).parents[1] / "recipes"


# How a drafter learns from a batch. What is in the batches, and how many there are, must be the same for all.
LEARNING = ("optimizer", "lr", "lr_matrices", "lr_rest", "weight_decay", "schedule", "warmup", "decay", "mean_decay")
LEARNING += ("start_from_target", "start_head_from_texts")


def plan_of(seed: int, options: argparse.Namespace) -> Plan:
    """All recipes, which must agree in everything but the drafter, its losses and how it learns."""
    places = {"target": options.target, "data": options.texts, "out": options.out / f"seed-{seed}", "dtype": "float32"}
    plan = make_plan(sorted(options.recipes.glob("*.toml")), places, {"seed": seed, "steps": options.steps})
    for recipe in plan.recipes:
        same = replace(recipe.settings, **{name: getattr(plan.settings, name) for name in LEARNING})
        if same != plan.settings:
            raise InvalidConfiguration(
                f"{recipe.name}.toml and {plan.recipes[0].name}.toml have different [train] tables: drafters are "
                f"compared on equal batches. Only these may differ: {', '.join(LEARNING)}"
            )
    return plan


def train(plan: Plan, target: Target, deadline: float) -> Trainer | None:
    """Train all recipes to the last step, or save and give up at the deadline."""
    trainer = Trainer(plan, target, is_quiet=True)
    trainer.resume()
    stream, saved = trainer.stream(), time.time()
    while (step := int(trainer.progress["step"])) < plan.settings.steps:
        if time.time() > deadline:
            trainer.save()
            return None
        trainer.step(stream)
        if step % 20 == 0:
            taus = " ".join(f"{s.recipe.name} {s.smooth['tau']:.2f}" for s in trainer.students)
            print(f"seed {plan.settings.seed} step {step}: {taus}", flush=True)
        if time.time() - saved > plan.settings.save_seconds:
            trainer.save()
            saved = time.time()
    trainer.save()
    return trainer


def prompts_of(options: argparse.Namespace) -> dict[str, list[list[int]]]:
    """Token ids of held-out prompts by domain."""
    settings = read_recipe(options.sources, "regenerate", RegenerateSettings)
    tokenizer = AutoTokenizer.from_pretrained(resolve(options.target))
    domains = dict.fromkeys(source.domain for source in settings.sources)
    return {
        domain: held_out_prompts(
            options.data, settings.sources, tokenizer, domain, options.prompts, settings.max_prompt
        )
        for domain in domains
    }


def measure(trainer: Trainer, prompts: dict[str, list[list[int]]], max_new: int) -> list[Measured]:
    """Every drafter of the run on the same answers."""
    model = trainer.target.model
    guessers = {s.recipe.name: load_guesser(s.out, model, torch.float32, 0) for s in trainer.students}
    rounds: dict[str, dict[str, list[list[list[int]]]]] = {name: {} for name in guessers}
    for domain, asked in prompts.items():
        for name, guesser in guessers.items():
            rounds[name][domain] = [[] for _ in range(guesser.block_size)]
        for name, matched, num_written in matched_answers(model, guessers, asked, max_new):
            for k, of_length in enumerate(rounds[name][domain]):
                of_length.append(walk(matched[:, : k + 1], num_written))
    return [
        Measured(
            student.recipe.name,
            trainer.settings.seed,
            len(student.model.layers),
            sum(p.numel() for p in student.model.parameters()),
            int(trainer.progress["step"]),
            int(trainer.progress["tokens"]),
            rounds[student.recipe.name],
        )
        for student in trainer.students
    ]


def run_seed(seed: int, options: argparse.Namespace, target: Target, deadline: float) -> bool:
    """Train and measure one seed; false when time was up first."""
    plan = plan_of(seed, options)
    if all((recipe.out / RESULTS).exists() for recipe in plan.recipes):
        return True
    trainer = train(plan, target, deadline)
    if trainer is None:
        return False
    for measured in measure(trainer, prompts_of(options), options.max_new):
        measured.save(plan.out / measured.name)
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="tiny")
    parser.add_argument("--texts", type=Path, required=True, help="what the target wrote: `dspark data regenerate`")
    parser.add_argument("--data", type=Path, required=True, help="folder with the sources of --sources")
    parser.add_argument("--sources", type=Path, default=RECIPES / "tiny" / "text.toml")
    parser.add_argument("--recipes", type=Path, default=RECIPES / "compare", help="folder of recipes (*.toml)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--over", nargs="+", default=BASELINES, metavar="NAME", help="show gains over these")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="default: the recipes' own")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no training step begins later")
    parser.add_argument("--prompts", type=int, default=48, help="per domain")
    parser.add_argument("--max-new", type=int, default=128, help="tokens of an answer at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", action="store_true", help="PNG files in --out, like the paper's figures 2, 3 and 4")
    options: Any = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    deadline = time.time() + 60 * options.minutes
    target = dspark.load_target(options.target, dtype="float32", device="cpu")
    for seed in range(options.seeds):
        if not run_seed(seed, options, target, deadline):
            print(f"time is up in seed {seed}: the same command goes on from there", flush=True)
            break
        found = Comparison(read_results(options.out))
        shown = table(found, options.over)
        print(shown, flush=True)
        (options.out / "table.md").write_text(shown, encoding="utf-8")
        if options.plot:
            save_plots(found, options.out)


if __name__ == "__main__":
    main()
