"""What benchmarks/calibration.py found, as tables and pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.calibration_trials import KINDS, SETTINGS

_COLOUR = {
    "raw": "#d9a514",
    "STS": "#7fb3d5",
    "STS + offset": "#2e6da4",
    "live": "#2a9d5c",
    "hindsight": "#888888",
    "all-knowing": "#a04bbd",
    "chance": "#bbbbbb",
}


def show(console: Console, found: dict[str, Any]) -> None:
    _show_worth(console, found["worth"])
    _show_bias(console, found["bias"])
    _show_forgetting(console, found["forgetting"])
    _show_recovery(console, found["recovery"])
    if check := found.get("check"):
        rates = ", ".join(f"{kind} {rate:.0f}" for kind, rate in check["tokens per second"].items())
        taus = ", ".join(f"{kind} {tau:.2f}" for kind, tau in check["tau"].items())
        console.print(
            f"real engine: {check['same']:.1%} of {check['rounds']} rounds as replayed; "
            f"8 requests, optimal: tokens/s {rates}; tau {taus}"
        )
    for line in conclusion(found):
        console.print(line)


def _show_worth(console: Console, cells: list[dict[str, Any]]) -> None:
    table = Table(title="tokens/s over raw confidences (± standard error), tau, verified per round, calibration error")
    for column in ("machine", "requests", "traffic", *KINDS):
        table.add_column(column)
    rows: dict[tuple[str, int, str], dict[str, str]] = {}
    for c in cells:
        error = "" if math.isnan(c["error"]) or c["kind"] == "raw" else f" ±{c['error']:.3f}"
        shown = f"{c['ratio']:.3f}{error}\n{c['tau']:.2f} {c['verified']:.1f} {c['error of calibration']:.1%}"
        if c["kind"] == "raw":
            shown = f"{c['rate']:.0f}/s\n" + shown.partition("\n")[2]
        rows.setdefault((c["machine"], c["requests"], c["setting"]), {})[c["kind"]] = shown
    for (machine, requests, setting), by_kind in rows.items():
        table.add_row(machine, str(requests), setting, *(by_kind[kind] for kind in KINDS))
    console.print(table)


def _show_bias(console: Console, biases: dict[str, dict[str, list[float]]]) -> None:
    table = Table(title="stated less observed survival, by position (8 requests, in-domain)")
    length = len(next(iter(biases["raw"].values())))
    for column in ("confidences", "domain", *(str(k + 1) for k in range(length))):
        table.add_column(column)
    for kind, by_domain in biases.items():
        for domain, gaps in by_domain.items():
            table.add_row(kind, domain, *(f"{gap:+.1%}" for gap in gaps))
    console.print(table)


def _show_forgetting(console: Console, rows: list[dict[str, float]]) -> None:
    table = Table(title="how fast live calibration may forget: calibration error around a switch, tokens/s")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        values = [f"{v:.0f}" if n.startswith(("rate", "memory")) else f"{v:.2%}" for n, v in row.items()]
        table.add_row(*values)
    console.print(table)


def _show_recovery(console: Console, recovery: dict[str, Any]) -> None:
    for switch, curves in recovery["error"].items():
        table = Table(title=f"{switch}, and steps take twice as long: calibration error and cost error")
        for column in ("steps", *curves, "cost"):
            table.add_column(column)
        for row in zip(recovery["steps"], *curves.values(), recovery["cost error"], strict=True):
            table.add_row(f"{row[0]:+d}", *(f"{v:.1%}" for v in row[1:]))
        console.print(table)


def conclusion(found: dict[str, Any]) -> list[str]:
    """What the numbers say, in words."""
    lines = []
    for machine in dict.fromkeys(c["machine"] for c in found["worth"]):
        for setting in SETTINGS:
            cells = [c for c in found["worth"] if c["machine"] == machine and c["setting"] == setting]
            gains = {
                k: [c["ratio"] - 1 for c in cells if c["kind"] == k] for k in ("STS + offset", "live", "hindsight")
            }
            most = max(c["ratio"] - 1 for c in cells if c["kind"] == "all-knowing")
            parts = ", ".join(f"{kind} {min(g):+.1%} to {max(g):+.1%}" for kind, g in gains.items())
            lines.append(f"{machine}, {setting}: {parts} over raw confidences; knowing all up to {most:+.0%}")
    recovery = found["recovery"]
    for switch, curves in recovery["error"].items():
        after = [
            (s, e, c) for s, e, c in zip(recovery["steps"], curves["live"], curves["chance"], strict=True) if s > 0
        ]
        back = next((str(s) for s, e, c in after if e - c < 0.03), "more")
        end, least = after[-1][1], after[-1][2]
        lines.append(
            f"{switch}: live beliefs are off by {after[0][1]:.1%} at first, less than 3 % above chance after {back} steps, "
            f"by {end:.1%} in the end (chance alone {least:.1%})"
        )
    lines.append(f"cost error {recovery['cost error'][5]:.0%} at first, {recovery['cost error'][-1]:.1%} in the end")
    return lines


def save_plots(prefix: Path, found: dict[str, Any]) -> None:
    """PREFIX-worth.png and PREFIX-recovery.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = found["worth"]
    machines = list(dict.fromkeys(c["machine"] for c in cells))
    figure, axes = pyplot.subplots(
        len(machines), len(SETTINGS), figsize=(11, 2.5 * len(machines)), sharey="row", squeeze=False
    )
    shown = ("STS", "STS + offset", "live", "hindsight")
    for row, machine in zip(axes, machines, strict=True):
        for axis, setting in zip(row, SETTINGS, strict=True):
            for i, kind in enumerate(shown):
                own = [c for c in cells if (c["machine"], c["setting"], c["kind"]) == (machine, setting, kind)]
                places = [x + 0.2 * (i - 1.5) for x in range(len(own))]
                gains, errors = [100 * (c["ratio"] - 1) for c in own], [196 * c["error"] for c in own]
                axis.bar(places, gains, 0.19, yerr=errors, color=_COLOUR[kind], label=kind, error_kw={"linewidth": 0.8})
            axis.axhline(0, color="black", linewidth=0.6)
            axis.set_xticks(range(len(own)), [str(c["requests"]) for c in own])
            axis.set_title(f"{machine}, {setting}", fontsize=8, loc="left")
            axis.tick_params(labelsize=7)
        row[0].set_ylabel("% tokens/s over raw", fontsize=8)
    axes[-1][1].set_xlabel("requests side by side", fontsize=8)
    axes[0][0].legend(fontsize=6, frameon=False)
    _save(pyplot, figure, prefix, "worth")

    recovery = found["recovery"]
    figure, axes = pyplot.subplots(1, len(recovery["error"]) + 1, figsize=(10.5, 2.7))
    for axis, (switch, curves) in zip(axes, recovery["error"].items(), strict=False):
        for kind, values in curves.items():
            style = {"linestyle": "--", "linewidth": 1} if kind == "chance" else {"marker": ".", "linewidth": 1.4}
            axis.plot(recovery["steps"], [100 * v for v in values], color=_COLOUR[kind], label=kind, **style)
        axis.set_title(f"{switch}: calibration error, %", fontsize=8, loc="left")
    axes[-1].plot(recovery["steps"], [100 * v for v in recovery["cost error"]], color="#2a9d5c", marker=".")
    axes[-1].axhline(10, color="#c0392b", linewidth=0.6, linestyle=":")
    axes[-1].set_title("steps take twice as long: cost error, %", fontsize=8, loc="left")
    for axis in axes:
        axis.axvline(0, color="black", linewidth=0.6)
        axis.set_xlabel("steps after the switch", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.set_ylim(bottom=0)
    axes[0].legend(fontsize=6, frameon=False)
    _save(pyplot, figure, prefix, "recovery")


def _save(pyplot: Any, figure: Any, prefix: Path, name: str) -> None:
    for axis in figure.axes:
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(prefix.with_name(f"{prefix.name}-{name}.png"), dpi=110)
    pyplot.close(figure)
