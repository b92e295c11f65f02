"""What a terminal shows around the text: a sign of life while loading, marks on draft tokens, the closing line."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from dspark.types import Round

_GREEN, _RESET = "\x1b[32m", "\x1b[0m"


def wants_colour(stream: TextIO, no_color: bool) -> bool:
    """Colour only for people: not in pipes and files, not with NO_COLOR (no-color.org) or --no-color."""
    return not no_color and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and stream.isatty()


def say(message: str) -> None:
    """A line about the run. On stderr, so that stdout is the text and nothing else."""
    print(f"dspark: {message}", file=sys.stderr, flush=True)


def print_json(result: Mapping[str, Any]) -> None:
    """One object for scripts, on a line. What is no number is null, as JSON has it."""
    print(json.dumps(_numbers_or_null(result), default=str, allow_nan=False))


def _numbers_or_null(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _numbers_or_null(part) for key, part in value.items()}
    return [_numbers_or_null(part) for part in value] if isinstance(value, list | tuple) else value


def new_file(name: str) -> Path:
    """A file to be written, as an argument's type: refused before the work whose results it is to hold."""
    path = Path(name)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{name} is a folder; name a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{name} cannot be written: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{name} may not be written")
    return path


@contextlib.contextmanager
def progress(message: str, no_color: bool) -> Iterator[None]:
    """A spinner on stderr while something takes long; one plain line where nobody watches."""
    from rich.console import Console

    console = Console(stderr=True, no_color=no_color or None, highlight=False)
    if console.is_terminal and not console.is_dumb_terminal:
        with console.status(message):
            yield
    else:
        say(message)
        yield


@contextlib.contextmanager
def quiet_drift() -> Iterator[None]:
    """No warnings that traffic has changed: the same few texts again and again are no traffic, and always surprise."""
    log = logging.getLogger("dspark.budget.beliefs")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def marked(text: str, is_drafted: bool) -> str:
    """Text as a terminal shows it: green where it was drafted."""
    return f"{_GREEN}{text}{_RESET}" if is_drafted else text


def acceptance_by_position(rounds: Sequence[Round]) -> list[tuple[int, int]]:
    """(accepted, reached) for draft position 1, 2, ...; in a tree that is depth.

    Reached: the target read a token there and had accepted all before it. So accepted / reached is the chance of a
    draft token whose predecessors were right, and lengths chosen by the scheduler do not bend it.
    """
    longest = max((r.reached for r in rounds), default=0)
    return [(sum(r.accepted >= k for r in rounds), sum(r.reached >= k for r in rounds)) for k in range(1, longest + 1)]


def speed(tokens_per_second: float) -> str:
    """Two digits at least: 0.48, 9.1, 213."""
    digits = f"{tokens_per_second:.0f}" if tokens_per_second >= 10 else f"{tokens_per_second:.2g}"
    return f"{digits} tokens/s"


def speculation_summary(tau: float, rounds: Sequence[Round]) -> str:
    """tau, rounds and acceptance by position, in one line."""
    summary = f"tau {tau:.2f} over {len(rounds)} target passes"
    if positions := acceptance_by_position(rounds):
        summary += ", accepted/reached by draft position: " + " ".join(f"{a}/{r}" for a, r in positions)
    return summary
