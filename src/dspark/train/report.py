"""What a run was like, in one HTML file without any outside resource: losses, tau, acceptance by position, cost."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dspark import __version__
from dspark.train.files import replace_file
from dspark.train.plan import Plan
from dspark.train.run_log import Table, time_left
from dspark.train.student import Recipe

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 560, 260, 52, 34, 12
_COLOURS = ("#1f5fa8", "#c0504d", "#3f8f4f", "#7f5fa8", "#b07d2b", "#4f9fa8")
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:left}"
    "figure{display:inline-block;margin:0 1em 1em 0}svg{background:#fff}figcaption{color:#555}"
)


@dataclass(frozen=True)
class Line:
    """One curve: points (x, y) in the order of x; errors, if there, are half the height of a bar at each point."""

    name: str
    points: Sequence[tuple[float, float]]
    errors: Sequence[float] = ()


def write_report(plan: Plan) -> None:
    """report.html in the run's folder."""
    parts = [_section(recipe) for recipe in plan.recipes]
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{_text(plan.out.name)}: training report</title>"
        f"<style>{_STYLE}</style><h1>Training report</h1><p>Target {_text(plan.target)}, texts {_text(plan.run.data)} "
        f"({len(plan.texts)} of {sum(map(len, plan.texts))} tokens), dspark {__version__}.</p>{''.join(parts)}</html>\n"
    )
    with replace_file(plan.out / "report.html") as partial:
        partial.write_text(page, encoding="utf-8")


def _section(recipe: Recipe) -> str:
    train, validation = (Table(recipe.out / f"{kind}.csv").rows() for kind in ("train", "validation"))
    charts = [
        chart(
            "step",
            "loss, training (running mean)",
            [_line(train, n) for n in ("total", "cross_entropy", "l1", "confidence")],
        ),
        chart(
            "step",
            "loss, held-out texts",
            [_line(validation, n) for n in ("total", "cross_entropy", "l1", "confidence")],
        ),
        chart(
            "step",
            "tau: estimated from single positions, and of decoding (bars: one standard error)",
            [
                _line(train, "tau", "estimate, training"),
                _line(validation, "tau", "estimate, held out"),
                _line(validation, "decoded_tau", "decoded", "decoded_tau_error"),
            ],
        ),
    ]
    if validation:
        charts.append(chart("draft position", "P(accepted | those before it were)", _acceptance(validation[-1])))
    return f"<h2>{_text(recipe.name)}</h2>{''.join(charts)}{_calibration(recipe)}{_cost(recipe, train, validation)}"


def _line(rows: Sequence[dict[str, float]], column: str, name: str = "", error: str = "") -> Line:
    points = [(row["step"], row[column]) for row in rows if column in row]
    return Line(name or column.replace("_", " "), points, [row[error] for row in rows if error and error in row])


def _acceptance(row: dict[str, float]) -> list[Line]:
    """Of the last validation: as decoded, and as the losses say it for single positions."""
    lines = []
    for prefix, name in (("accepted_", "decoded"), ("acceptance_", "estimate")):
        columns = sorted((int(c.removeprefix(prefix)), v) for c, v in row.items() if c.startswith(prefix))
        lines.append(Line(name, [(float(k), v) for k, v in columns]))
    return lines


def _calibration(recipe: Recipe) -> str:
    """What `dspark calibrate` left beside the drafter, if it has been run."""
    path = recipe.out / "calibration.json"
    if not path.exists():
        return "<p>Not calibrated yet: <code>dspark calibrate</code>.</p>"
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored |= stored.get("origin") or {}
    lines = [
        Line(name.replace("_", " "), [(float(k + 1), float(v)) for k, v in enumerate(stored[name])])
        for name in ("ece_before", "ece_after", "auc", "temperatures")
        if stored.get(name)
    ]
    return chart("draft position", "calibration", lines)


def _cost(recipe: Recipe, train: Sequence[dict[str, float]], validation: Sequence[dict[str, float]]) -> str:
    last: dict[str, float] = max((*train[-1:], *validation[-1:]), key=lambda row: row["step"], default={})
    best = max((row for row in validation if "decoded_tau" in row), key=lambda row: row["decoded_tau"], default=None)
    seconds = last.get("seconds", 0.0)
    rows: list[tuple[str, Any]] = [
        ("steps", f"{last.get('step', 0):.0f} of {recipe.settings.steps}"),
        ("tokens read, prompts included", f"{last.get('tokens', 0):,.0f}"),
        ("positions learned from", f"{last.get('positions', 0):,.0f}"),
        ("time, validation included", time_left(seconds)),
        ("tokens per second", f"{last.get('tokens', 0) / seconds:.0f}" if seconds else "-"),
        ("best decoded tau", f"{best['decoded_tau']:.3f} at step {best['step']:.0f}" if best else "not decoded"),
        ("drafter", ", ".join(f"{k} {v}" for k, v in vars(recipe.config).items())),
        ("training", ", ".join(f"{k} {v}" for k, v in vars(recipe.settings).items())),
        ("losses", ", ".join(f"{k} {v}" for k, v in vars(recipe.weights).items())),
    ]
    return f"<table>{''.join(f'<tr><th>{_text(k)}<td>{_text(v)}' for k, v in rows)}</table>"


def chart(x_name: str, caption: str, lines: Sequence[Line]) -> str:
    """A line chart as inline SVG; points that are no numbers are left out."""
    drawn = [
        Line(line.name, kept, line.errors if len(kept) == len(line.points) else ())
        for line in lines
        if (kept := [(x, y) for x, y in line.points if math.isfinite(x) and math.isfinite(y)])
    ]
    if not drawn:
        return ""
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points]
    x_range, y_range = _range(xs, pad=0.0), _range(ys, pad=0.05)
    right, floor = _WIDTH - 8, _HEIGHT - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_range[0]) / (x_range[1] - x_range[0])
        up = (y - y_range[0]) / (y_range[1] - y_range[0])
        return round(_LEFT + across * (right - _LEFT), 1), round(floor - up * (floor - _TOP), 1)

    parts = []
    for tick in range(5):
        y = y_range[0] + tick * (y_range[1] - y_range[0]) / 4
        x = x_range[0] + tick * (x_range[1] - x_range[0]) / 4
        height, across = at(x_range[0], y)[1], at(x, y_range[0])[0]
        parts.append(f'<path d="M{_LEFT} {height}H{right}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{height + 4}" text-anchor="end">{y:.3g}</text>')
        parts.append(f'<text x="{across}" y="{floor + 15}" text-anchor="middle">{x:.4g}</text>')
    parts.append(f'<text x="{right}" y="{_HEIGHT - 4}" text-anchor="end">{_text(x_name)}</text>')
    for number, line in enumerate(drawn):
        colour = _COLOURS[number % len(_COLOURS)]
        places = [at(x, y) for x, y in line.points]
        path = "M" + "L".join(f"{x} {y}" for x, y in places)
        parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        if len(places) < 40:
            parts += [f'<circle cx="{x}" cy="{y}" r="2.4" fill="{colour}"/>' for x, y in places]
        for (x, y), error in zip(line.points, line.errors, strict=False):
            (place, low), (_, high) = at(x, y - error), at(x, y + error)
            parts.append(f'<path d="M{place} {low}V{high}" stroke="{colour}"/>')
        parts.append(f'<text x="{_LEFT + 8}" y="{_TOP + 12 + 14 * number}" fill="{colour}">{_text(line.name)}</text>')
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" font-size="11" role="img">{"".join(parts)}</svg>'
    return f"<figure>{svg}<figcaption>{_text(caption)}</figcaption></figure>"


def _range(values: Sequence[float], pad: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        return low - 0.5, high + 0.5
    return low - pad * (high - low), high + pad * (high - low)


def _text(value: Any) -> str:
    return html.escape(str(value))
