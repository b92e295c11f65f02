"""Mistakes on the command line name what was probably meant, below a usage that fits on a line."""

from __future__ import annotations

import pytest

from dspark.cli.main import _parser


@pytest.mark.parametrize(
    ("line", "command", "meant"),
    [
        ("genrate hi", "dspark", "generate"),
        ("generate hi --temprature 0", "dspark generate", "--temperature"),
        ("generate hi --top-kk=3", "dspark generate", "--top-k"),
        ("data regenrate", "dspark data", "regenerate"),
        ("data prepare x --target tiny --out y --sistem z", "dspark data prepare", "--system"),
        ("generate hi --rule rejektion", "dspark generate", "rejection"),
        ("convert dspark --to vlm --out x", "dspark convert", None),
        ("info x --frobnicate", "dspark info", None),
    ],
)
def test_a_mistake_names_the_command_and_what_was_meant(
    capsys: pytest.CaptureFixture[str], line: str, command: str, meant: str | None
) -> None:
    with pytest.raises(SystemExit) as end:
        _parser().parse_args(line.split())
    usage, error = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and usage.startswith(f"usage: {command} ") and error.startswith(f"{command}: error: ")
    assert error.endswith(f"; did you mean {meant}?") if meant else "did you mean" not in error


def test_the_usage_has_what_is_needed_and_help_has_everything(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        _parser().parse_args(["data", "prepare", "--help"])
    told = capsys.readouterr().out
    assert end.value.code == 0 and "--on-error" in told
    assert told.startswith("usage: dspark data prepare --target TARGET --out OUT [OPTIONS] IN [IN ...]")
