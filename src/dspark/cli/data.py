"""Turn text into training data: `data prepare` renders it, `data regenerate` has the target answer it.

    dspark data regenerate my_text/ --target path/or/hub-id --out answers

A drafter is scored on what its target writes, so regenerated text is what to train on; prepared text is for answers
that the target has already written.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.cli.models import add_placement, add_threads, drafter_name, open_target, quiet_weights, set_threads
from dspark.cli.terminal import progress, say
from dspark.errors import InvalidConfiguration

if TYPE_CHECKING:
    from dspark.train.answers import AnswerSettings, Tally
    from dspark.train.rendering import Renderer

_NUM_REASONS = 5  # for which records have no answer, the most frequent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True, dest="action")
    prepare = actions.add_parser(
        "prepare",
        help="render records with the target's chat template and mark the assistant's tokens",
    )
    _add_input(prepare)
    prepare.add_argument("--max-length", type=int, default=4096, help="tokens of one text at most (default 4096)")
    prepare.add_argument("--min-answer", type=int, default=4, help="skip texts with fewer answer tokens (default 4)")
    prepare.set_defaults(act=_prepare)
    regenerate = actions.add_parser("regenerate", help="answer every user turn with the target itself")
    _add_input(regenerate)
    regenerate.add_argument("--temperature", type=float, nargs="+", help="one is drawn per record (default 1)")
    for flag, meaning in (
        ("max-new", "tokens of one answer at most (default 512)"),
        ("max-prompt", "tokens of a prompt at most; conversations end before longer ones (default 2048)"),
        ("text-prompt", "tokens of a plain text that the target continues (default 64)"),
        ("batch", "records answered side by side (default 32)"),
        ("seed", "same seed, same answers (default 0)"),
    ):
        regenerate.add_argument(f"--{flag}", type=int, help=meaning)
    regenerate.add_argument("--drafter", help="as in `dspark generate` (default: dspark for tiny, otherwise none)")
    add_placement(regenerate)
    regenerate.add_argument("--compile", action="store_true", help="compile the engine's steps first")
    regenerate.add_argument("--base-url", help="ask this OpenAI-compatible server instead: http://host:port/v1")
    regenerate.add_argument("--model", help="the model's name at that server (default: the target's)")
    regenerate.add_argument("--api-key-file", type=Path, help="file with the server's key")
    regenerate.set_defaults(act=_regenerate)


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="IN", help=".jsonl, .parquet or text files, folders, hub datasets")
    parser.add_argument("--target", required=True, help="tiny, a folder or a hub id")
    parser.add_argument("--out", type=Path, required=True, help="folder for the texts")
    parser.add_argument("--system", help="system prompt for conversations without one: the one that will be served")
    parser.add_argument("--on-error", choices=["skip", "stop"], default="stop", help="what a malformed record does")
    parser.add_argument("--limit", type=int, help="read this many records at most")
    add_threads(parser)
    parser.add_argument("--no-color", action="store_true", help="no colours (also: the NO_COLOR variable)")


def run(args: argparse.Namespace) -> int:
    if args.limit is not None and args.limit < 1:
        raise InvalidConfiguration(f"--limit must be 1 or more; got {args.limit}")
    set_threads(args)
    code: int = args.act(args)
    return code


def _records(args: argparse.Namespace) -> Any:
    from itertools import islice

    from dspark.train.records import read_records

    return islice(read_records(args.inputs, args.on_error), args.limit)


def _refuse_nothing(args: argparse.Namespace, num_records: int) -> None:
    if not num_records:
        raise InvalidConfiguration(f"there is no record in {', '.join(args.inputs)}: the files are empty")


def _prepare(args: argparse.Namespace) -> int:
    from dspark.train.prepare import prepare
    from dspark.train.rendering import Renderer, load_tokenizer

    tokenizer, vocab_size = load_tokenizer(args.target)
    counts = prepare(
        _records(args),
        Renderer(tokenizer, args.system),
        args.out,
        args.target,
        vocab_size,
        max_length=args.max_length,
        min_answer=args.min_answer,
    )
    _refuse_nothing(args, counts.read)
    reasons = counts.skipped_by_reason()
    say(
        f"{counts.read} records read = {counts.written} written + {counts.skipped} skipped; "
        f"{counts.tokens:,} tokens, {counts.learned:,} to learn from, in {args.out}"
    )
    for reason, count in reasons:
        say(f"skipped {count}: {reason}")
    return 0


def _regenerate(args: argparse.Namespace) -> int:
    from dspark.train.answers import AnswerSettings, answer_records
    from dspark.train.rendering import Renderer, load_tokenizer

    names = ("max_new", "max_prompt", "text_prompt", "batch", "seed", "system")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.temperature:
        given["temperatures"] = tuple(args.temperature)
    settings = AnswerSettings(**given)
    quiet_weights(args.target)
    tokenizer, vocab_size = load_tokenizer(args.target)
    renderer = Renderer(tokenizer, args.system)
    if _goes_on(args, settings, renderer, vocab_size):
        say(f"going on with {args.out}")
    answerer = _server(args, renderer) if args.base_url else _engine(args, settings, renderer)
    try:
        tally = answer_records(_records(args), answerer, settings, args.out, _Reporter())
    except KeyboardInterrupt:
        say(f"stopped; what is answered is in {args.out}, and the same command goes on from there")
        raise
    _refuse_nothing(args, tally.num_records)
    _save_counts(args.out, tally)
    say(
        f"{tally.num_records} records read = {tally.written} written + {tally.failed} failed + {tally.skipped} skipped; "
        f"{tally.tokens:,} tokens answered, in {args.out}"
    )
    if tally.truncated:
        say(f"{tally.truncated} truncated: answers cut off at {settings.max_new} tokens (--max-new)")
    for (status, reason), count in tally.reasons.most_common(_NUM_REASONS):
        say(f"{status} {count}: {reason}")
    return 0


def _engine(args: argparse.Namespace, settings: AnswerSettings, renderer: Renderer) -> Any:
    from dspark import Engine, load_drafter
    from dspark.train.answers import EngineAnswerer

    with progress(f"loading {args.target}", args.no_color):
        target = open_target(args)
        drafter = load_drafter(drafter_name(args), target)
        engine = Engine(target, drafter, max_num_seqs=settings.batch, max_num_batched_tokens=2048, compile=args.compile)
    return EngineAnswerer(engine, renderer)


def _server(args: argparse.Namespace, renderer: Renderer) -> Any:
    from dspark.train.remote import ServerAnswerer

    key = args.api_key_file.read_text(encoding="utf-8").strip() if args.api_key_file else None
    return ServerAnswerer(args.base_url, args.model or args.target, renderer, key)


def _goes_on(args: argparse.Namespace, settings: AnswerSettings, renderer: Renderer, vocab_size: int) -> bool:
    """Write down how this folder is made, or make sure that it goes on in the same way. Returns whether it goes on."""
    from dspark.checkpoints.prompt_format import fingerprint, template_fingerprint, tokenizer_fingerprint
    from dspark.train.prepare import input_of
    from dspark.train.texts import INFO, TextsInfo, read_infos

    wanted = asdict(settings) | {"input": input_of(args.inputs), "on_error": args.on_error}
    wanted.pop("batch")  # answers do not depend on it
    info = TextsInfo(
        target=os.fspath(args.target),
        vocab_size=vocab_size,
        tokenizer=tokenizer_fingerprint(renderer.tokenizer),
        template=template_fingerprint(renderer.tokenizer),
        system_prompt=fingerprint(args.system),
        made_by="regenerate",
        settings=wanted,
        counts={},
    )
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / INFO).exists():
        info.save(args.out)
        return False
    [before, *_] = read_infos(args.out)
    for name in ("target", "vocab_size", "tokenizer", "template", "system_prompt", "made_by"):
        if getattr(before, name) != getattr(info, name):
            raise InvalidConfiguration(
                f"{args.out} was made with another {name.replace('_', ' ')}: use a new folder, or the same as then"
            )
    for name, value in fingerprintable(wanted).items():
        if before.settings.get(name) != value:
            raise InvalidConfiguration(
                f"{args.out} was begun with {name} = {before.settings.get(name)!r}, and now it is {value!r}: "
                "use a new folder, or the same as then"
            )
    return True


def fingerprintable(settings: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def _save_counts(out: Path, tally: Tally) -> None:
    from dataclasses import replace

    from dspark.train.texts import read_infos

    [info, *_] = read_infos(out)
    replace(info, counts=tally.counts).save(out)


class _Reporter:
    """A line now and then: how far it is."""

    def __init__(self) -> None:
        import time

        self.clock = time.monotonic
        self.started = self.last = self.clock()
        self.first_tokens: int | None = None

    def __call__(self, tally: Tally) -> None:
        now = self.clock()
        if self.first_tokens is None:
            self.first_tokens = tally.tokens
        if now - self.last >= 10:
            self.last = now
            speed = (tally.tokens - self.first_tokens) / (now - self.started)
            say(f"{tally.num_records} records, {tally.tokens:,} tokens, {speed:.0f} tokens/s")
