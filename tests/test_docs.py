"""The pages hold together: links and anchors lead somewhere, named files exist, and shown commands are commands."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspark.cli.main import _parser

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "monitoring/*.md", "pairs/**/*.md", "recipes/**/*.md")
    for path in ROOT.glob(pattern)
)
CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
PARTS = "src|tests|docs|benchmarks|recipes|pairs|monitoring|" + "|".join(
    path.name for path in (ROOT / "src" / "dspark").iterdir() if path.is_dir()
)
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#{1,6} (.*)$", CODE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    seen: Counter[str] = Counter()
    found = set()
    for heading in headings:
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return found


def commands(text: str) -> Iterator[str]:
    """Lines of code, and code within lines, that begin with `dspark VERB`; continued lines are joined."""
    joined = re.sub(r"\\\n\s*", "", text)
    lines = re.findall(r"^(?: {4,}(?:\$ )?|\$ )?(dspark [a-z-]+(?: .*)?)$", joined, re.MULTILINE)
    inline = re.findall(r"`(dspark [a-z-]+ [^`]*)`", joined)
    for command in (*lines, *inline):
        yield re.sub(r"\s+#.*$", "", command).replace("…", "something")


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        place, _, anchor = link.partition("#")
        goal = (page.parent / place).resolve() if place else page
        assert goal.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(goal), f"{link}: there is no such heading"


@every_page
def test_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(rf"`((?:{PARTS})/[\w./-]+\.(?:py|md|toml|cpp|html|json|yml))`", text)
    named += re.findall(r"python (benchmarks/\w+\.py)", text)
    for name in named:
        bases = (ROOT, ROOT / "src" / "dspark", page.parent)
        assert any((base / name).exists() for base in bases), f"{name} is not there"
    for module in re.findall(r"python -m ((?:dspark|benchmarks)(?:\.\w+)+)(?![\w.]*…)", text):
        path = ROOT / ("src" if module.startswith("dspark") else "") / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{module} is no module"


@every_page
def test_commands_are_understood(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in commands(page.read_text(encoding="utf-8")):
        words = shlex.split(command)[1:]
        try:
            _parser().parse_args(words)
        except SystemExit as end:
            complaint = capsys.readouterr().err
            is_only_named = "the following arguments are required" in complaint  # as in "with `dspark train --resume`"
            if end.code and not is_only_named:
                pytest.fail(f"{command}: {complaint}")


def test_there_are_commands_to_check() -> None:
    shown = [command for page in PAGES for command in commands(page.read_text(encoding="utf-8"))]
    assert len(shown) > 40 and len({command.split()[1] for command in shown}) > 10


def test_every_recipe_of_the_pair_starts_from_what_another_has_made() -> None:
    """Where `start_from` looks is where a command of the page has put it."""
    page, made = ROOT / "recipes" / "tiny" / "README.md", set[str]()
    for line in re.findall(r"^ {4}((?:dspark|python) .*--out .*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        out = re.findall(r"--out (\S+)", line)[0]
        made |= {f"{out}/{name}" for name in re.findall(r"recipes/tiny/([\w-]+)\.toml", line)} | {out}
    wanted = {
        start
        for recipe in page.parent.glob("*.toml")
        for start in re.findall(r'^start_from = "(.*)"', recipe.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(wanted) > 5 and wanted <= made
