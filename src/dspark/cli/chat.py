"""Talk with a target model in the terminal.

Accepted draft tokens are green. Enter sends; /new starts over, /quit or Ctrl-D ends it, Ctrl-C stops an answer.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING, Any

from dspark.cli import generate
from dspark.cli.terminal import marked, progress, say, speculation_summary, wants_colour
from dspark.errors import DSparkError

if TYPE_CHECKING:
    from dspark import Engine, SamplingParams

_REMEMBERED = 8192  # tokens; the conversation so far is not read again for every answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    generate.add_model_arguments(parser)
    generate.add_sampling_arguments(parser)
    parser.add_argument("--system", help="system message before the conversation")
    parser.add_argument("--no-color", action="store_true", help="no colours (also: the NO_COLOR variable)")


def run(args: argparse.Namespace) -> int:
    with progress(generate.loading(args), args.no_color):
        params = generate.sampling_params(args)
        engine = generate.make_engine(args, prefix_tokens=_REMEMBERED)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # input() then edits lines and remembers them
    opening = [{"role": "system", "content": args.system}] if args.system else []
    say("Enter sends, /new starts over, /quit ends")
    messages = list(opening)
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if line in ("/quit", "/exit"):
            return 0
        if line == "/new":
            messages = list(opening)
        elif line:
            messages = _turn(engine, params, messages, line, wants_colour(sys.stdout, args.no_color))


def _turn(engine: Engine, params: SamplingParams, messages: list[Any], line: str, colour: bool) -> list[Any]:
    """Answer one line; the conversation afterwards. One that cannot be answered is taken back."""
    from dspark.engine.marks import DraftMarks

    asked = [*messages, {"role": "user", "content": line}]
    try:
        stream = engine.stream(asked, params)
    except DSparkError as error:
        say(f"error: {error}")
        return messages
    marks = DraftMarks(engine.target.tokenizer)
    try:
        for delta in stream:
            for text, is_drafted in marks.split(delta):
                sys.stdout.write(marked(text, is_drafted and colour))
            sys.stdout.flush()
    except KeyboardInterrupt:
        stream.close()
    print()
    generation = stream.generation
    say(speculation_summary(generation.tau, generation.rounds))
    return [*asked, {"role": "assistant", "content": generation.text}]
