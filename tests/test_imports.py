"""The shape of the package: imports go downward only, and the public names are exactly these."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dspark

SOURCE = Path(dspark.__file__).parent

# From the top down; a module may import its own part and every tier below, never its neighbours or what is above.
TIERS = [
    {"__main__"},
    {"cli"},
    {"serve", "evaluate", "train"},
    {"monitor", "engine"},
    {"drafters", "budget", "checkpoints"},
    {"target"},
    {"sampling", "triton_sampling", "noise", "verify", "losses", "config"},
    {"types"},
    {"errors", "transfer", "cards", "caches", "triton_probe", "gradients", "pages"},
]
LEVELS = {part: len(TIERS) - number for number, tier in enumerate(TIERS) for part in tier}
NEIGHBOURS = {
    ("drafters", "checkpoints"),  # drafters/loading reads checkpoints; checkpoints build drafters.block
    ("checkpoints", "drafters"),
    ("drafters", "budget"),  # a drafter is loaded with the calibration of its confidences
    ("verify", "sampling"),
    ("sampling", "noise"),
    ("verify", "noise"),
    ("cards", "triton_probe"),
}
PUBLIC = {
    "load_target",
    "load_drafter",
    "Engine",
    "SamplingParams",
    "Generation",
    "Round",
    "Delta",
    "Request",
    "Draft",
    "StepRecord",
    "Drafter",
    "DSparkError",
    "InvalidRequest",
    "InvalidConfiguration",
    "UnsupportedModel",
    "CheckpointError",
    "OutOfSlots",
}


def modules() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def part_of(path: Path) -> str:
    """`engine` for dspark/engine/text.py, `types` for dspark/types/draft.py."""
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imported_parts(path: Path) -> Iterator[tuple[int, str]]:
    """(line, part) of every import from this package, those inside functions and `if TYPE_CHECKING` included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: imports name the package, so that this test can read them"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top == "dspark" and rest:
                # a public name stands for the module it lives in
                home = getattr(dspark, rest).__module__.removeprefix("dspark.") if rest in PUBLIC else rest
                yield node.lineno, home.partition(".")[0]


def test_every_module_has_its_place() -> None:
    assert {part_of(path) for path in modules()} <= set(LEVELS)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_downward(path: Path) -> None:
    part = part_of(path)
    upward = [
        f"line {line}: {part} imports {other}"
        for line, other in imported_parts(path)
        if other not in (part, "__version__") and LEVELS[other] >= LEVELS[part] and (part, other) not in NEIGHBOURS
    ]
    assert not upward, f"{path.relative_to(SOURCE)}: " + "; ".join(upward)


def test_the_public_names_are_exactly_these() -> None:
    assert set(dspark.__all__) == PUBLIC
    assert len(dspark.__all__) == len(PUBLIC)
    for name in dspark.__all__:
        assert getattr(dspark, name).__name__ == name


@pytest.mark.parametrize("module", ["dspark", "dspark.cli.main", "dspark.cli.generate", "dspark.cli.info"])
def test_help_loads_no_model_library(module: str) -> None:
    code = f"import sys, {module}; sys.exit(bool({{'torch', 'transformers', 'rich'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_who_compiles_waits_for_the_compiler() -> None:
    code = (
        "import sys, dspark; dspark.Engine; dspark.load_target; sys.exit('torch._inductor.compile_fx' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
