"""Make a drafter's confidences mean what they say, from held-out prompts.

    dspark calibrate --target path/or/hub-id --drafter runs/quick --data held_out.jsonl --fit-bias

Every draft is verified at full length while the target answers; half of the prompts fit the calibration, and the figures
printed are of the other half. It is stored in the drafter's folder, where every later command finds it.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.cli.models import add_target, add_threads, open_target, set_threads
from dspark.cli.terminal import print_json, progress, say
from dspark.errors import InvalidConfiguration, InvalidRequest

if TYPE_CHECKING:
    from dspark.budget.calibration import Calibration, Origin, Outcomes
    from dspark.budget.reliability import Interval, Report
    from dspark.target.target import Target
    from dspark.types import Drafter

_VARIANTS = ("raw", "sts", "affine")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument("--drafter", default="dspark", help="with a confidence head: dspark (default), a folder")
    add_threads(parser)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        required=True,
        type=Path,
        help="a chat JSONL file or a folder of them (all rows), or a training data folder (its held-out 2 %%)",
    )
    data.add_argument("--recipe", type=Path, help="TOML with sources: their domains and shares in a data folder")
    data.add_argument("--shifted", type=Path, help="data of another kind, only judged, with a third as many questions")
    data.add_argument("--prompts", type=int, default=450, help="questions, half of them to fit (default 450)")
    data.add_argument("--max-prompt", type=int, default=288, help="longer questions are left out (default 288 tokens)")
    data.add_argument("--max-tokens", type=int, default=160, help="tokens per answer at most (default 160)")
    data.add_argument("--temperature", type=float, default=1.0, help="of sampling; 0 is greedy (default 1)")
    data.add_argument("--rule", default="coupled", choices=["coupled", "rejection"], help="default coupled")
    data.add_argument("--seed", type=int, default=0, help="of the answers and of the halves (default 0)")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--method",
        choices=["affine", "sts"],
        default="affine",
        help="what is stored: temperature and offset by position (default), or the paper's temperatures alone",
    )
    output.add_argument(
        "--fit-bias",
        action="store_true",
        help="first correct the confidence head itself, by one number in its weights: its bias, for --rule",
    )
    output.add_argument(
        "--out", type=Path, help="folder to write to (default: the drafter's, if it was given as a folder)"
    )
    output.add_argument("--dry-run", action="store_true", help="judge, and write nothing")
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument("--no-color", action="store_true", help="no colours (also: the NO_COLOR variable)")


def run(args: argparse.Namespace) -> int:
    _check(args)
    from dspark.budget.calibration import fit_affine, fit_temperatures, split, with_bias

    set_threads(args)
    with progress(f"loading {args.target}", args.no_color):
        from dspark import load_drafter

        target = open_target(args)
        drafter = load_drafter(args.drafter, target)
    folder = _folder(args, drafter)
    started = time.perf_counter()
    fitting, held_out = split(_collect(args, args.data, args.prompts, target, drafter), args.seed)
    bias = _bias(fitting, held_out) if args.fit_bias else 0.0
    fitting, held_out = with_bias(fitting, bias), with_bias(held_out, bias)
    fitted: dict[str, Calibration | None] = {
        "raw": None,
        "sts": fit_temperatures(fitting),
        "affine": fit_affine(fitting),
    }
    judged = {"held out": _judge(fitted, held_out)}
    domains = sorted(set(held_out.domains))
    judged |= {domain: _judge(fitted, held_out.of_domain(domain)) for domain in domains if len(domains) > 1}
    if args.shifted:
        others = with_bias(_collect(args, args.shifted, max(2, args.prompts // 3), target, drafter), bias)
        judged["shifted"] = _judge(fitted, others)
        judged |= {f"shifted {d}": _judge(fitted, others.of_domain(d)) for d in sorted(set(others.domains))}
    if bias and not args.dry_run:
        _correct_head(folder, bias)
    calibrations = {
        name: dataclasses.replace(
            fit, origin=_origin(args, name, target, drafter, fitting, held_out, judged["held out"])
        )
        for name, fit in fitted.items()
        if fit is not None
    }
    written = [] if args.dry_run else _write(args, folder, calibrations, judged)
    if args.json:
        print_json(_as_json(calibrations, judged, written))
    else:
        _print(args, calibrations, judged)
        say(
            f"{time.perf_counter() - started:.0f} s; " + (f"wrote {', '.join(written)}" if written else "wrote nothing")
        )
    return 0


def _judge(fitted: dict[str, Calibration | None], outcomes: Outcomes) -> dict[str, Report]:
    """How far each of them is off about these outcomes."""
    from dspark.budget.reliability import report

    believed = {name: c.apply(outcomes.confidence) if c else outcomes.confidence for name, c in fitted.items()}
    return {
        name: report(b.cumprod(1), outcomes.survived, outcomes.known, outcomes.prompts) for name, b in believed.items()
    }


def _origin(
    args: argparse.Namespace,
    method: str,
    target: Target,
    drafter: Drafter,
    fitting: Outcomes,
    held_out: Outcomes,
    judged: dict[str, Report],
) -> Origin:
    from dspark.budget.calibration import Origin, fingerprint

    before, after = judged["raw"], judged[method]
    return Origin(
        target=target.name,
        drafter=args.drafter,
        weights=fingerprint(drafter.folder),  # type: ignore[attr-defined]  # _folder has asked
        temperature=args.temperature,
        rule=args.rule,
        labels="outcome",
        method=method,
        data=tuple(sorted(set(held_out.domains))),
        num_prompts=len(fitting.domains),
        num_rounds=len(fitting.prompts),
        num_held_out_prompts=len(held_out.domains),
        num_held_out_rounds=len(held_out.prompts),
        ece_before=tuple(round(r.ece.value, 4) for r in before.positions),
        ece_after=tuple(round(r.ece.value, 4) for r in after.positions),
        auc=tuple(round(r.auc.value, 4) for r in after.positions),
    )


def _check(args: argparse.Namespace) -> None:
    for name, least in (("prompts", 2), ("max_prompt", 1), ("max_tokens", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise InvalidRequest(f"--{name.replace('_', '-')} must be {least} or more; got {value}")
    for path in (args.data, args.shifted, args.recipe):
        if path is not None and not path.exists():
            raise InvalidRequest(f"{path} does not exist; expected a .jsonl file or a folder (--recipe: a TOML file)")


def _folder(args: argparse.Namespace, drafter: Drafter) -> Path:
    """Where to write; asked before anything is measured, so that nothing is measured in vain."""
    own = getattr(drafter, "folder", None)
    if own is None:
        raise InvalidConfiguration(
            f"the drafter {args.drafter} has no confidence head and no folder, so there is nothing to calibrate "
            "beforehand: the engine learns its acceptance while serving. Use a drafter such as dspark"
        )
    if args.fit_bias and args.out:
        raise InvalidRequest("--fit-bias changes the drafter where it lies: copy its folder, and leave --out out")
    folder: Path = args.out or own
    if not (args.out or args.dry_run or Path(args.drafter).is_dir()):
        raise InvalidRequest(
            f"{args.drafter} comes with the package, where others use it too: give --out FOLDER to write the calibration "
            f"elsewhere, --dry-run to write nothing, or its folder to change it in place (--drafter {own})"
        )
    if not args.dry_run:
        if args.out:
            folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise InvalidConfiguration(f"{folder} cannot be written to: name another folder with --out, or --dry-run")
    return folder


def _collect(args: argparse.Namespace, data: Path, num: int, target: Target, drafter: Drafter) -> Outcomes:
    from dspark.engine.text import has_chat_template, render_prompt
    from dspark.evaluate.outcomes import collect
    from dspark.train.held_out import choose, questions_of, sources_of
    from dspark.types import SamplingParams

    sources = sources_of(args.recipe) if args.recipe and data == args.data else ()
    prompts: list[list[int]] = []
    domains: list[str] = []
    for domain, question in choose(questions_of(data, sources, args.seed), 2 * num):
        ids = render_prompt(target.tokenizer, question, raw=not has_chat_template(target.tokenizer))
        if len(ids) <= args.max_prompt and len(prompts) < num:
            prompts.append(ids)
            domains.append(domain)
    if len(prompts) < 2:
        raise InvalidRequest(f"{data} has {len(prompts)} questions of at most {args.max_prompt} tokens; 2 are needed")
    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens, seed=args.seed)
    with progress(f"answering {len(prompts)} questions of {data.name}", args.no_color):
        return collect(target, drafter, prompts, params, args.rule, domains=domains)


def _bias(fitting: Outcomes, held_out: Outcomes) -> float:
    """What the head's bias lacks; 0 where adding it would not help on the questions it was not fitted to."""
    from dspark.budget.calibration import fit_bias, log_loss, with_bias

    bias = fit_bias(fitting)
    before, after = log_loss(held_out), log_loss(with_bias(held_out, bias))
    what = f"bias {bias:+.3f}, with which the held-out log loss goes from {before:.4f} to {after:.4f}"
    say(f"the confidence head {'gets' if after < before else 'stays as it is, without'} {what}")
    return bias if after < before else 0.0


def _correct_head(folder: Path, bias: float) -> None:
    from dspark.budget.calibration import FILE, SGLANG_FILE
    from dspark.checkpoints.confidence_bias import add_to_confidence_bias

    for name in (FILE, SGLANG_FILE):  # of the head as it was: killed from here on, the drafter has none
        (folder / name).unlink(missing_ok=True)
    add_to_confidence_bias(folder, bias)


def _write(
    args: argparse.Namespace,
    folder: Path,
    calibrations: dict[str, Calibration],
    judged: dict[str, dict[str, Report]],
) -> list[str]:
    from dspark.budget.calibration import FILE, SGLANG_FILE
    from dspark.budget.reliability import plot_reliability

    calibrations[args.method].save(folder / FILE)
    calibrations["sts"].save_for_sglang(folder / SGLANG_FILE)
    picture = folder / "calibration.png"
    shown = [name for name in ("held out", "shifted") if name in judged]  # domains are in the table
    try:
        plot_reliability(picture, [(n, judged[n]["raw"], judged[n][args.method]) for n in shown])
    except InvalidConfiguration as error:
        say(f"no diagrams: {error}")
        return [FILE, SGLANG_FILE]
    return [str(folder / FILE), SGLANG_FILE, picture.name]


def _print(
    args: argparse.Namespace, calibrations: dict[str, Calibration], judged: dict[str, dict[str, Report]]
) -> None:
    of = judged["held out"]
    origin = calibrations["sts"].origin
    assert origin is not None
    print(
        f"fitted on {origin.num_prompts} prompts ({origin.num_rounds:,} rounds), judged on {origin.num_held_out_prompts} "
        f"others ({origin.num_held_out_rounds:,} rounds); temperature {args.temperature:g}, {args.rule} rule\n"
    )
    print("                    calibration error of survival             Brier score    fitted")
    print("position  survived     raw     sts  affine  chance    AUC    raw    affine  sts: T  affine: T, offset")
    rows = zip(*(of[name].positions for name in _VARIANTS), strict=True)
    for k, (raw, sts, affine) in enumerate(rows):
        a = calibrations["affine"]
        print(
            f"{k + 1:<10}{raw.rate:8.1%}  {_percent(raw.ece)}  {_percent(sts.ece)}  {_percent(affine.ece)}  "
            f"{affine.ece_floor:6.2%}  {_ranking(affine.auc.value)}  {raw.brier.value:.3f}   {affine.brier.value:.3f}"
            f"    {calibrations['sts'].temperatures[k]:.2f}    {a.temperatures[k]:.2f}, {a.offsets[k]:+.2f}"
        )
    print()
    print(f"{'mean of positions':<37}calibration error (95 % interval, less what chance adds)")
    print(
        f"{'judged on':<20}prompts  rounds   raw                   sts                   affine"
        "                chance   AUC"
    )
    for name, of in judged.items():
        values = "  ".join(f"{_percent(of[v].mean_ece)} {_range(of[v].mean_ece):<13}" for v in _VARIANTS)
        best = of["affine"]
        known = [r.auc.value for r in best.positions if not math.isnan(r.auc.value)]
        auc = sum(known) / len(known) if known else math.nan
        print(
            f"{name:<20}{best.num_prompts:>7} {best.num_rounds:>7,}   {values}  {best.mean_floor:.2%}   {_ranking(auc)}"
        )
    print(
        "\nraw: survival as the drafter states it; sts: its confidences with a temperature T per position, affine: with T "
        f"and an offset\n(stored: {args.method}). Calibration error: how far stated survival is from what was observed; "
        "chance: the error that as many\nrounds would show if nothing were wrong. AUC: how well drafts that survive are told "
        "from others, 0.5 (not at all) to 1; -: all were alike.\nBrier score: mean square of stated less observed; the lower "
        "the better."
    )


def _ranking(auc: float) -> str:
    return "    -" if math.isnan(auc) else f"{auc:.3f}"


def _percent(interval: Interval) -> str:
    return f"{interval.value:6.2%}"


def _range(interval: Interval) -> str:
    return f"({100 * interval.low:.2f}-{100 * interval.high:.2f})"


def _as_json(
    calibrations: dict[str, Calibration], judged: dict[str, dict[str, Report]], written: list[str]
) -> dict[str, Any]:
    return {
        "calibrations": {name: dataclasses.asdict(c) for name, c in calibrations.items()},
        "judged": {name: {v: dataclasses.asdict(of[v]) for v in _VARIANTS} for name, of in judged.items()},
        "written": written,
    }
