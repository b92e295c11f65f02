"""Check that speculation changes nothing but speed, on the configuration you deploy.

    dspark verify-lossless --target path/or/hub-id --drafter my_drafter --dtype bfloat16

Every prompt is generated with and without speculation from the same seed, and the token ids are compared. A difference
is looked up in float32: explained if rounding in the target's dtype can turn it, a bug otherwise. Under the rejection
rule, which promises the same distribution, the first tokens are sampled many times and the two samples tested.
Exit code 1: there are unexplained differences.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.cli.models import add_hub, add_target, add_threads, check_names, open_target, set_threads
from dspark.cli.terminal import new_file, print_json, progress, quiet_drift, say
from dspark.errors import InvalidRequest

if TYPE_CHECKING:
    from dspark import Engine
    from dspark.evaluate.lossless import LawCheck, TokenCheck
    from dspark.monitor.identity import LogitsOf
    from dspark.target.target import Target

DIFFERENT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models = parser.add_argument_group("configuration")
    add_target(models)
    models.add_argument("--drafter", help="as for generate (default: dspark for tiny, otherwise ngram)")
    add_hub(models)
    models.add_argument("--scheduler", default="auto", help="how much is verified, as for generate")
    models.add_argument("--rule", default="coupled", choices=["coupled", "rejection"], help="acceptance rule")
    models.add_argument("--compile", action="store_true", help="compile the models, as for generate")
    models.add_argument(
        "--deterministic", action="store_true", help="as for generate; then rounding explains no difference"
    )
    add_threads(models)
    test = parser.add_argument_group("test")
    test.add_argument("--prompts", type=int, default=16, metavar="N", help="built-in prompts to use (default 16)")
    test.add_argument(
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help="one per line, or .jsonl; not the built-in ones",
    )
    test.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0], metavar="X", help="default: 0 1")
    test.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="B", help="batch sizes (default: 1 8)")
    test.add_argument("--max-tokens", type=int, default=64, metavar="N", help="tokens per text (default 64)")
    test.add_argument("--seed", type=int, default=0, metavar="N", help="of the first text (default 0)")
    test.add_argument(
        "--samples", type=int, default=400, metavar="N", help="per prompt, --rule rejection (default 400)"
    )
    test.add_argument(
        "--keep",
        type=new_file,
        metavar="FILE",
        help="write both token traces of every difference to this JSON lines file",
    )
    test.add_argument("--json", action="store_true", help="print one JSON object")
    test.add_argument("--no-color", action="store_true", help="no colours (also: the NO_COLOR variable)")


def run(args: argparse.Namespace) -> int:
    from dspark.types import SamplingParams

    _check(args)
    args.drafter = args.drafter or ("dspark" if args.target == "tiny" else "ngram")
    check_names(args.target, args.drafter, args.scheduler, args.rule)
    laws = [SamplingParams(temperature=t, max_tokens=args.max_tokens, seed=args.seed) for t in args.temperature]
    with progress(f"loading {args.target}", args.no_color):
        from dspark.evaluate import lossless, prompts

        target, speculative, plain = _engines(args)
        texts, raw = prompts.fitting(target.tokenizer, target.vocab_size, args.prompts)
        if args.prompts_file:
            texts = [sample.prompt for sample in prompts.from_file(args.prompts_file)]
    dtype = str(target.dtype).removeprefix("torch.")
    logits_of = _Single(args) if dtype != "float32" and not args.deterministic else None
    token_checks: list[TokenCheck] = []
    law_checks: list[LawCheck] = []
    for params in laws:
        with progress(f"temperature {params.temperature:g}, {len(texts)} prompts", args.no_color), quiet_drift():
            if args.rule == "coupled" or params.temperature == 0:
                check = lossless.check_tokens(speculative, plain, texts, params, args.batch, dtype, logits_of, raw)
                token_checks.append(check)
            else:
                some, batch = texts[: max(1, len(texts) // 4)], max(args.batch)
                law_checks += lossless.check_laws(speculative, plain, some, params, args.samples, batch, raw)
    if args.keep:
        _keep(args.keep, token_checks)
    num_bugs = sum(c.num_unexplained for c in token_checks) + sum(c.is_unexplained for c in law_checks)
    if args.json:
        print_json(_as_json(args, dtype, token_checks, law_checks, num_bugs))
    else:
        _report(args, dtype, token_checks, law_checks, num_bugs)
    return DIFFERENT if num_bugs else 0


def _check(args: argparse.Namespace) -> None:
    for name in ("prompts", "max_tokens", "samples"):
        if getattr(args, name) < 1:
            raise InvalidRequest(f"--{name.replace('_', '-')} must be 1 or more; got {getattr(args, name)}")
    if min(args.batch) < 1:
        raise InvalidRequest(f"--batch sizes must be 1 or more; got {min(args.batch)}")


def _engines(args: argparse.Namespace) -> tuple[Target, Engine, Engine]:
    from dspark import Engine, load_drafter

    set_threads(args)
    target = open_target(args, deterministic=args.deterministic)
    drafter = load_drafter(args.drafter, target)
    options: dict[str, Any] = dict(rule=args.rule, max_num_seqs=max(args.batch), compile=args.compile)
    return target, Engine(target, drafter, scheduler=args.scheduler, **options), Engine(target, None, **options)


class _Single:
    """Logits of the target in float32, which is loaded when the first difference asks for it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._logits_of: LogitsOf | None = None

    def __call__(self, context: Sequence[int]) -> Any:
        from dspark.monitor.identity import logits_by_target

        if self._logits_of is None:
            self._logits_of = logits_by_target(open_target(self._args, "float32"))
        return self._logits_of(context)


def _keep(path: str, checks: Sequence[TokenCheck]) -> None:
    with Path(path).open("w", encoding="utf-8") as file:
        for check in checks:
            for p in check.partings:
                trace = {
                    "temperature": check.temperature,
                    "batch": p.batch,
                    "seed": p.seed,
                    **p.difference.as_json(),
                    "prompt_token_ids": p.prompt_token_ids,
                    "token_ids": p.token_ids,
                    "plain_token_ids": p.plain_token_ids,
                }
                file.write(json.dumps(trace) + "\n")


def _report(
    args: argparse.Namespace, dtype: str, tokens: Sequence[TokenCheck], laws: Sequence[LawCheck], num_bugs: int
) -> None:
    batches = ", ".join(str(b) for b in args.batch)
    print(f"{args.target} with {args.drafter}, {dtype}, {args.scheduler}, rule {args.rule}, batches of {batches}")
    for check in tokens:
        same = check.num_texts - len(check.partings)
        print(
            f"temperature {check.temperature:g}: {same} of {check.num_texts} texts identical to plain decoding "
            f"({check.num_tokens} tokens, tau {check.tau:.2f}), {check.num_explained} differences explained by rounding, "
            f"{check.num_unexplained} unexplained"
        )
        if not check.num_verified:
            say(
                f"at temperature {check.temperature:g} the scheduler {args.scheduler} had no draft token read, so nothing "
                "was tried there: --scheduler fixed:7 has them read whatever they cost"
            )
        for parting in check.partings:
            print(f"  prompt {parting.prompt_index}, batch {parting.batch}: {_described(parting.difference)}")
    for law in laws:
        verdict = "DIFFERENT LAWS" if law.is_unexplained else "the same law, as far as this can tell"
        print(
            f"temperature {law.temperature:g}, prompt {law.prompt_index}: G = {law.test.statistic:.1f} with "
            f"{law.test.degrees} degrees of freedom, p = {law.test.p:.2g} over 2 x {law.num_samples} samples: {verdict}"
        )
    if not _num_judged(tokens, laws):
        say("no draft token was accepted, so this run says little: does the drafter fit the target?")
    print("lossless" if not num_bugs else f"NOT lossless: {num_bugs} unexplained")


def _described(difference: Any) -> str:
    ours, plain = ("the end" if t is None else t for t in (difference.token_id, difference.plain_token_id))
    gap = "" if difference.gap is None else f", gap {difference.gap:.3g}, rounding allows {difference.tolerance:.3g}"
    verdict = "explained" if difference.is_explained else "UNEXPLAINED"
    return f"{verdict} at position {difference.position}: {ours} instead of {plain}{gap}"


def _num_judged(tokens: Sequence[TokenCheck], laws: Sequence[LawCheck]) -> int:
    return sum(c.num_accepted for c in tokens) + sum(c.num_accepted for c in laws)


def _as_json(
    args: argparse.Namespace, dtype: str, tokens: Sequence[TokenCheck], laws: Sequence[LawCheck], num_bugs: int
) -> dict[str, Any]:
    return {
        "target": args.target,
        "drafter": args.drafter,
        "dtype": dtype,
        "rule": args.rule,
        "scheduler": args.scheduler,
        "batch": args.batch,
        "lossless": not num_bugs,
        "unexplained": num_bugs,
        "draft_tokens_accepted": _num_judged(tokens, laws),
        "token_checks": [check.as_json() for check in tokens],
        "law_checks": [law.as_json() for law in laws],
    }
