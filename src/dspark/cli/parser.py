"""argparse as a person would like it: a usage of one line, and mistakes that name what was probably meant."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import Any, NoReturn

_CHOICE = re.compile(r"invalid choice: '?([^' ]*)'? \(choose from (.*)\)")


class Parser(argparse.ArgumentParser):
    """One command. Its options are listed by --help, so the usage names only what has to be there."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)  # what is short for one flag today may be two tomorrow
        self.set_defaults(parser=self)  # of the innermost command that was named

    def parse_args(  # type: ignore[override]  # argparse has overloads for namespaces of other types
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """As argparse does; an option that nobody knows is the innermost command's mistake."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            found.parser.refuse(unknown)
        del found.parser  # what is found goes to other processes, and parsers cannot
        return found

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Exit with 2 and a line that says which of these words nobody knows, and what is like the first."""
        known = [option for action in self._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], known, 1)
        meant = f"; did you mean {near[0]}?" if near else f"; {self.prog} --help lists the options"
        self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")

    def error(self, message: str) -> NoReturn:
        """Exit with 2: the usage and what is wrong with the command line."""
        if choice := _CHOICE.search(message):
            near = difflib.get_close_matches(choice[1], re.findall(r"[\w-]+", choice[2]), 1)
            message += f"; did you mean {near[0]}?" if near else ""
        self.exit(2, f"{self.format_usage()}{self.prog}: error: {message}\n")

    def format_usage(self) -> str:
        """One line: the command, what it cannot do without, and [OPTIONS]."""
        self.usage = self._short_usage()
        return super().format_usage()

    def format_help(self) -> str:
        """As argparse's, below the short usage."""
        self.usage = self._short_usage()
        return super().format_help()

    def _short_usage(self) -> str:
        words = ["%(prog)s"]
        for action in self._actions:
            if action.option_strings and action.required:
                choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
                words.append(f"{action.option_strings[-1]} {action.metavar or choices}")
        words.append("[OPTIONS]")
        for action in self._actions:
            if not action.option_strings:
                name = str(action.metavar or action.dest.upper())
                words.append({"+": f"{name} [{name} ...]", argparse.PARSER: f"{name} ..."}.get(str(action.nargs), name))
        return " ".join(words)
