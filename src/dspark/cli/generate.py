"""Write text with a target model, several tokens at a time.

    dspark generate "What is a river?" --temperature 0 --compare
    dspark generate "Write a haiku" --target path/or/hub-id --drafter ngram --dtype bfloat16

Without options it uses the embedded pair. Text goes to stdout as it comes; accepted draft tokens are green on a terminal.
Everything about the run goes to stderr.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dspark.cli.models import (
    add_hub,
    add_overlap,
    add_target,
    add_threads,
    check_names,
    check_overlap,
    drafter_name,
    open_target,
    set_threads,
)
from dspark.cli.terminal import (
    marked,
    print_json,
    progress,
    quiet_drift,
    say,
    speculation_summary,
    speed,
    wants_colour,
)
from dspark.errors import InvalidRequest

if TYPE_CHECKING:
    from dspark import Engine, Generation, SamplingParams
    from dspark.cli.against_plain import Comparison

# Given to SamplingParams only when the user names them, so that its defaults stay the only ones.
_SAMPLING: dict[str, tuple[type, str]] = {
    "temperature": (float, "0 is greedy (default 1)"),
    "top-k": (int, "keep the k likeliest tokens (default 0: all)"),
    "top-p": (float, "keep the smallest set of likeliest tokens with this mass (default 1)"),
    "min-p": (float, "keep tokens at least this fraction as likely as the likeliest (default 0)"),
    "repetition-penalty": (float, "of tokens in prompt or output; 1 is none (default 1)"),
    "presence-penalty": (float, "of every token already in the output (default 0)"),
    "frequency-penalty": (float, "of tokens in the output, once per occurrence (default 0)"),
    "max-tokens": (int, "tokens to write at most (default 256)"),
    "seed": (int, "same seed, same text, with and without speculation (default: a new one each time)"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="what to answer, or with --raw to continue; - reads it from stdin")
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    prompt = parser.add_argument_group("prompt and output")
    prompt.add_argument("--system", help="system message before the prompt")
    prompt.add_argument("--raw", action="store_true", help="continue the prompt as it stands: no chat template")
    prompt.add_argument("--compare", action="store_true", help="run plain decoding too: speed-up and equality")
    prompt.add_argument("--json", action="store_true", help="print one JSON object instead of streaming text")
    prompt.add_argument("--no-color", action="store_true", help="no colours (also: the NO_COLOR variable)")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What `make_engine` reads."""
    models = parser.add_argument_group("models")
    add_target(models)
    models.add_argument(
        "--drafter",
        help="none, ngram, self, sparse; with a target that ships them dspark, dflash, eagle3, draft; a folder, a hub id "
        "or file.py:make (default: dspark for tiny, otherwise none)",
    )
    add_hub(models)
    speculation = parser.add_argument_group("speculation")
    speculation.add_argument("--tree", type=int, metavar="N", help="draft a tree of N tokens, not a chain")
    speculation.add_argument("--scheduler", default="auto", help="how much is verified: auto (default), fixed:7, ...")
    speculation.add_argument(
        "--rule", default="coupled", choices=["coupled", "rejection"], help="acceptance rule (default coupled)"
    )
    speculation.add_argument("--compile", action="store_true", help="compile the models first; pays for long outputs")
    speculation.add_argument(
        "--deterministic", action="store_true", help="same bits alone, in a draft and in company (chains, uncompiled)"
    )
    add_overlap(speculation)
    add_threads(speculation)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """What `sampling_params` reads."""
    sampling = parser.add_argument_group("sampling")
    for name, (kind, text) in _SAMPLING.items():
        metavar = "N" if kind is int else "X"
        sampling.add_argument(f"--{name}", type=kind, metavar=metavar, default=argparse.SUPPRESS, help=text)
    sampling.add_argument("--stop", action="append", default=argparse.SUPPRESS, help="string that ends it; repeatable")
    sampling.add_argument("--ignore-eos", action="store_true", default=argparse.SUPPRESS, help="go on past end tokens")


@dataclass(frozen=True)
class _Run:
    """What a streamed generation was like. Seconds count from handing in the prompt: no model loading."""

    generation: Generation
    seconds: float
    interrupted: bool

    @property
    def tokens_per_second(self) -> float:
        return len(self.generation.token_ids) / self.seconds


def run(args: argparse.Namespace) -> int:
    prompt = _prompt(args)
    with progress(loading(args), args.no_color):
        params = sampling_params(args)
        engine = make_engine(args)
    if args.compile:
        with progress("warming up", args.no_color):
            engine.generate([prompt], replace(params, max_tokens=min(16, params.max_tokens)), raw=args.raw)

    from dspark.budget.hindsight import Hindsight

    engine.observers.append(hindsight := Hindsight(per_step=args.json))
    with quiet_drift():
        streamed = _stream(engine, prompt, params, args)
    engine.observers.remove(hindsight)
    if not args.json:
        legend = "; green: accepted draft tokens" if wants_colour(sys.stdout, args.no_color) else ""
        say(_closing_line(streamed) + legend)
        if _fills_the_context(streamed.generation, params):
            say(f"the text ends here because prompt and text fill the {engine.max_length} tokens that the target holds")
        if engine.drafter.length:
            say(hindsight.line())
    comparison = None
    if args.compare and not streamed.interrupted:
        comparison = _compare(engine, prompt, params, args, streamed.generation.seed)
    if args.json:
        print_json(_as_json(streamed, comparison) | {"scheduling": hindsight.as_json()})
    elif comparison:
        _report(comparison, engine, args)
    return 130 if streamed.interrupted else 0


def _prompt(args: argparse.Namespace) -> Any:
    text = args.prompt
    if text == "-":
        text = sys.stdin.read()
        if not args.raw:
            text = text.removesuffix("\n")  # echo and editors add it; a raw prompt means every byte
    if not text:
        raise InvalidRequest("the prompt is empty: give at least one character")
    if args.system is None:
        return text
    if args.raw:
        raise InvalidRequest("--raw puts nothing around the prompt, so --system has no place: leave one of them out")
    return [{"role": "system", "content": args.system}, {"role": "user", "content": text}]


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """What the flags say, and the defaults of SamplingParams for the rest."""
    from dspark import SamplingParams

    names = [*(name.replace("-", "_") for name in _SAMPLING), "stop", "ignore_eos"]
    return SamplingParams(**{name: getattr(args, name) for name in names if hasattr(args, name)})


def loading(args: argparse.Namespace) -> str:
    """What `make_engine` is busy with."""
    return f"loading {args.target}" + (
        " and compiling, which can take some minutes the first time" if args.compile else ""
    )


def make_engine(args: argparse.Namespace, prefix_tokens: int = 0) -> Engine:
    """Load the models that the flags name."""
    from dspark import Engine, load_drafter

    if args.deterministic and args.tree is not None:
        raise InvalidRequest("--deterministic reads chains: leave out --tree")
    check_names(args.target, drafter_name(args), args.scheduler, args.rule)
    check_overlap(args)
    set_threads(args)
    target = open_target(args, deterministic=args.deterministic)
    shape = {} if args.tree is None else {"tree": args.tree}
    drafter = load_drafter(drafter_name(args), target, **shape)
    options = {"scheduler": args.scheduler, "rule": args.rule, "compile": args.compile, "overlap": args.overlap}
    return Engine(target, drafter, **options, prefix_tokens=prefix_tokens)


def _stream(engine: Engine, prompt: Any, params: SamplingParams, args: argparse.Namespace) -> _Run:
    """Write text as it comes. Ctrl-C ends it early and keeps what there is."""
    from dspark.engine.marks import DraftMarks

    colour = wants_colour(sys.stdout, args.no_color)
    interrupted = False
    started = time.perf_counter()
    stream = engine.stream(prompt, params, raw=args.raw)
    with _text_line(quiet=args.json) as write:
        try:
            marks = DraftMarks(engine.target.tokenizer, stream.request.context) if colour else None
            for delta in stream:
                if marks is None:
                    write(delta.text)
                else:
                    write("".join(marked(text, is_drafted) for text, is_drafted in marks.split(delta)))
        except KeyboardInterrupt:
            interrupted = True
        seconds = time.perf_counter() - started
    generation = stream.generation
    if interrupted:  # in the middle of a step: its slots are not worth tidying, since the process ends
        generation = replace(generation, finish_reason="cancelled")
    return _Run(generation, seconds, interrupted)


@contextmanager
def _text_line(quiet: bool) -> Iterator[Any]:
    last = ""

    def write(text: str) -> None:
        nonlocal last
        if text and not quiet:
            sys.stdout.write(text)
            sys.stdout.flush()
            last = text

    yield write
    if last and not last.endswith("\n"):
        write("\n")


def _closing_line(streamed: _Run) -> str:
    generation = streamed.generation
    num_tokens = len(generation.token_ids)
    line = "interrupted: " if streamed.interrupted else ""
    line += f"{num_tokens} tokens in {streamed.seconds:.2f} s ({speed(streamed.tokens_per_second)}, "
    return line + f"model loading not counted), {speculation_summary(generation.tau, generation.rounds)}"


def _fills_the_context(generation: Generation, params: SamplingParams) -> bool:
    return generation.finish_reason == "length" and len(generation.token_ids) < params.max_tokens


def _compare(engine: Engine, prompt: Any, params: SamplingParams, args: argparse.Namespace, seed: int) -> Comparison:
    from dspark import Engine
    from dspark.cli.against_plain import compare

    say("comparing with plain decoding")  # no spinner: it would take time from what is being timed
    plain = Engine(engine.target, None, scheduler=args.scheduler, rule=args.rule, compile=args.compile)
    with quiet_drift():
        return compare(engine, plain, prompt, params, args.raw, seed)


def _report(comparison: Comparison, engine: Engine, args: argparse.Namespace) -> None:
    runs = "one run each" if comparison.num_runs == 1 else f"medians of {comparison.num_runs} interleaved runs each"
    say(
        f"speculative {speed(comparison.tokens_per_second)}, plain {speed(comparison.plain_tokens_per_second)}: "
        f"{comparison.speedup:.2f}x ({runs}, warmed up, model loading not counted)"
    )
    difference = comparison.difference
    if difference is None:
        say("token ids are identical to plain decoding")
        return

    def named(token_id: int | None) -> str:
        return "the end" if token_id is None else f"{token_id} {engine.target.tokenizer.decode([token_id])!r}"

    ours, plain = named(difference.token_id), named(difference.plain_token_id)
    say(f"token ids differ from plain decoding: the first at position {difference.position}, {ours} instead of {plain}")
    if args.rule == "rejection":
        say("the rejection rule promises the same distribution, not the same tokens; --rule coupled promises both")
    else:
        say("rounding can turn near ties when several tokens are read at once; --dtype float32 makes this rarer")


def _as_json(streamed: _Run, comparison: Comparison | None) -> dict[str, Any]:
    generation = streamed.generation
    result: dict[str, Any] = {
        "text": generation.text,
        "token_ids": generation.token_ids,
        "finish_reason": generation.finish_reason,
        "tau": generation.tau,
        "tokens_per_second": (comparison or streamed).tokens_per_second,
        "rounds": [[r.drafted, r.verified, r.accepted] for r in generation.rounds],
    }
    if comparison:
        result["compare"] = comparison.as_json()
    return result
