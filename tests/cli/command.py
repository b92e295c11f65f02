"""Runs the real command: in this process where that is enough, in one of its own where signals and pipes matter."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dspark.cli.main import main

PAIR = Path(__file__).parents[2] / "pairs" / "tiny"
COMMAND = [sys.executable, "-m", "dspark"]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `dspark ARGV`."""
    capsys.readouterr()
    code = main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    code, out, err = run(capsys, *argv, "--json")
    assert code == 0, err
    assert out.count("\n") == 1, "exactly one object on one line"
    result: dict[str, Any] = json.loads(out)
    return result


def base_model(folder: Path) -> str:
    """The embedded target as a base model: without a chat template."""
    shutil.copytree(PAIR / "target", folder, ignore=shutil.ignore_patterns("chat_template.jinja"))
    return str(folder)


def start(*argv: str, **options: Any) -> subprocess.Popen[bytes]:
    """A process that obeys Ctrl-C even where the shell that runs the tests ignores it."""
    return subprocess.Popen(
        [*COMMAND, *argv],
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "", **options.pop("env", {})},
        **options,
    )


def running_in_group(group: int) -> list[int]:
    """Processes of a group that do anything but wait for somebody to take note of their end."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = status.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_group) == group and state != "Z":
            found.append(int(status.parent.name))
    return found


def is_one_line_error(err: str) -> bool:
    last = err.strip().splitlines()[-1]
    return last.startswith("dspark: error: ") and "Traceback" not in err
