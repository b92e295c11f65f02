"""The report: one file that needs nothing else, with what the tables say."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from dspark.train.report import Line, chart, write_report
from dspark.train.texts import Text, save_texts
from train.processes import make_trainer
from train.test_trainer import write_recipe


class Wellformed(HTMLParser):
    """Collects tags; anything that would fetch from elsewhere is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert tag not in ("script", "link", "img", "iframe"), tag
        assert not {"src", "href"} & {name for name, _ in attrs}


def test_a_run_leaves_a_report_of_itself(target_folder: Path, tmp_path: Path) -> None:
    rows = [Text.after_prompt(torch.tensor([7, 8, *(10 + (i + j) % 12 for j in range(20))]), 2) for i in range(12)]
    (tmp_path / "a & b").mkdir()
    save_texts(rows, tmp_path / "a & b" / "shard-00000.safetensors")
    recipe = write_recipe(tmp_path / "dspark.toml")
    trainer = make_trainer(target_folder, tmp_path / "a & b", tmp_path / "run", [recipe], steps=6)
    trainer.run()
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    seen = Wellformed()
    seen.feed(page)
    assert seen.tags.count("svg") == 4 and "a &amp; b" in page and "http" not in page
    assert "6 of 6" in page and f"{trainer.progress['tokens']:,.0f}" in page and "Not calibrated yet" in page
    assert f"{trainer.students[0].best_tau:.3f} at step" in page
    content = {"temperatures": [1.1, 1.2], "origin": {"ece_before": [0.1, 0.2], "ece_after": [0.01, 0.02], "auc": []}}
    (tmp_path / "run" / "dspark" / "calibration.json").write_text(json.dumps(content), encoding="utf-8")
    write_report(trainer.plan)
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 5 and "ece after" in page


def test_points_lie_where_their_values_are() -> None:
    svg = chart("step", "a <caption>", [Line("one", [(0, 1.0), (5, float("nan")), (10, 3.0)]), Line("none", [])])
    places = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]
    (x0, y0), (x1, y1) = places
    assert x0 < x1 and y0 > y1, "up is smaller in SVG"
    assert "a &lt;caption&gt;" in svg and svg.count("<circle") == 2
    assert chart("step", "empty", [Line("none", [(1.0, float("inf"))])]) == ""


@pytest.mark.parametrize("values", [[(1.0, 2.0)], [(1.0, 2.0), (2.0, 2.0)]])
def test_flat_curves_are_drawn_too(values: list[tuple[float, float]]) -> None:
    assert chart("x", "flat", [Line("one", values)]).count("<circle") == len(values)
