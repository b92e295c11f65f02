"""What benchmarks/gpu.py found, as tables, aims and a picture."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import summary, table
from benchmarks.contenders import PLAIN
from benchmarks.gpu_captured import CapturedRow, TilingRow
from benchmarks.gpu_kernels import KernelRow
from benchmarks.gpu_overlap import OverlapRow
from benchmarks.gpu_sections import DeterministicRow, RoundRow, StepRow
from benchmarks.measure import Section

AUTO = "ours: dspark@auto"


@dataclass(frozen=True)
class DecodeRow:
    """One load: tokens per second by contender, of plain decoding at the floor, and tokens per target pass."""

    requests: int
    rates: dict[str, float]
    floor: float
    tau: dict[str, float]
    num_repeats: int
    skipped: list[str]

    def over_plain(self, contender: str) -> float | None:
        return self.rates[contender] / self.rates[PLAIN] if {contender, PLAIN} <= self.rates.keys() else None


def decoded(section: Section, floor: float, skipped: Sequence[str]) -> DecodeRow:
    accepted = {name: summary.acceptance(section.of(name)) for name in section.families}
    return DecodeRow(
        section.num_requests,
        {row.contender: row.rate for row in summary.rows(section, [])},
        floor,
        {name: a.tau for name, a in accepted.items() if a is not None},
        section.num_repeats,
        list(skipped),
    )


def show(console: Console, section: str, rows: Sequence[Any]) -> None:
    console.print(_TABLES[section](rows))
    for line in rows[0].skipped if section == "decode" and rows else ():
        console.print(f"skipped: {line}", highlight=False)


def _steps(rows: Sequence[StepRow]) -> Table:
    found = Table("requests", "tokens", "context", "ms", "floor ms", "of the floor", title="Target passes")
    for r in rows:
        found.add_row(
            str(r.requests), str(r.tokens), str(r.context), _ms(r.seconds), _ms(r.floor), f"{r.floor / r.seconds:.0%}"
        )
    return found


def _captured(rows: Sequence[CapturedRow]) -> Table:
    headings = (
        "requests",
        "tokens",
        "context",
        "eager ms",
        "recorded",
        "compiled and recorded",
        "floor",
        "recording s",
    )
    found = Table(*headings, "MB", title="Target passes, eager and replayed")
    for r in rows:
        compiled = "" if r.compiled is None else _ms(r.compiled)
        times = (_ms(r.eager), _ms(r.captured), compiled, _ms(r.floor), f"{r.recording:.1f}")
        found.add_row(str(r.requests), str(r.tokens), str(r.context), *times, f"{r.num_megabytes:.0f}")
    return found


def _tilings(rows: Sequence[TilingRow]) -> Table:
    headings = (
        "requests",
        "tokens",
        "context",
        "usual µs",
        "fastest µs",
        "floor µs",
        "rows, keys, split, warps, stages",
    )
    found = Table(*headings, title="Attention of one layer, in the usual tiling and in the fastest")
    for r in rows:
        times = (f"{1e6 * seconds:.0f}" for seconds in (r.usual, r.fastest, r.floor))
        found.add_row(str(r.requests), str(r.tokens), str(r.context), *times, ", ".join(map(str, r.tiling)))
    return found


def _kernels(rows: Sequence[KernelRow]) -> Table:
    found = Table("what", "requests", "tokens", "context", "ours µs", "torch µs", "floor µs", title="One call")
    for r in rows:
        times = (f"{1e6 * seconds:.0f}" for seconds in (r.kernel, r.torch, r.floor))
        found.add_row(r.what, str(r.requests), str(r.tokens), str(r.context), *times)
    return found


def _overlap(rows: Sequence[OverlapRow]) -> Table:
    headings = ("requests", "context", "policy", "plain loop ms", "overlapped", "host", "floor", "busy", "same tokens")
    found = Table(*headings, title="Steps of the plain loop and of the overlapped one")
    for r in rows:
        times = map(_ms, (r.plain, r.overlapped, r.host, r.floor))
        busy = "" if r.plain_busy is None or r.busy is None else f"{r.plain_busy:.0%}, {r.busy:.0%}"
        found.add_row(str(r.requests), str(r.context), r.policy, *times, busy, "yes" if r.is_same else "NO")
    return found


def _rounds(rows: Sequence[RoundRow]) -> Table:
    headings = ("requests", "context", "plain ms", "draft", "verify", "round / plain", "floor: plain", "draft", "busy")
    found = Table(*headings, title="Engine steps: plain, and with drafts verified in full (acceptance replayed)")
    for r in rows:
        times = map(_ms, (r.plain, r.draft, r.verify))
        ratio = f"{(r.draft + r.verify) / r.plain:.2f}x"
        busy = "" if r.plain_busy is None or r.busy is None else f"{r.plain_busy:.0%}, {r.busy:.0%}"
        found.add_row(str(r.requests), str(r.context), *times, ratio, _ms(r.plain_floor), _ms(r.draft_floor), busy)
    return found


def _decode(rows: Sequence[DecodeRow]) -> Table:
    found = Table("contender", *(_requests(r.requests) for r in rows), title="Tokens/s, acceptance replayed")
    for name in rows[0].rates if rows else ():
        cells = []
        for r in rows:
            if name not in r.rates:  # it serves fewer requests
                cells.append("")
                continue
            times = f", {r.over_plain(name):.2f}x" if name != PLAIN and PLAIN in r.rates else ""
            tau = f", tau {r.tau[name]:.2f}" if r.tau.get(name, 1) > 1 else ""
            cells.append(table.number(r.rates[name]) + times + tau)
        found.add_row(name, *cells)
    found.add_row("floor of plain decoding", *(table.number(r.floor) for r in rows))
    return found


def _deterministic(rows: Sequence[DeterministicRow]) -> Table:
    found = Table(
        "requests", "tokens", "ms", "deterministic ms", "ratio", title="Target passes, batch-invariant or not"
    )
    for r in rows:
        times = (_ms(r.plain), _ms(r.deterministic), f"{r.deterministic / r.plain:.2f}x")
        found.add_row(str(r.requests), str(r.tokens), *times)
    return found


_TABLES: dict[str, Callable[[Any], Table]] = {
    "steps": _steps,
    "captured": _captured,
    "tilings": _tilings,
    "kernels": _kernels,
    "overlap": _overlap,
    "rounds": _rounds,
    "decode": _decode,
    "deterministic": _deterministic,
}


def aims(found: Mapping[str, Sequence[Any]]) -> list[tuple[bool, str]]:
    """(reached, what) for each aim that this run can judge."""
    lines: list[tuple[bool, str]] = []
    slower = [r for r in found.get("kernels", ()) if r.kernel > r.torch]
    if found.get("kernels"):
        lines.append((not slower, f"kernels behind torch in {len(slower)} of {len(found['kernels'])} sizes, aim none"))
    if captured := [r for r in found.get("captured", ()) if r.num_megabytes]:  # on CPU nothing is recorded
        slower = [r for r in captured if r.captured > r.eager]
        lines.append((not slower, f"recorded steps behind eager ones in {len(slower)} of {len(captured)}, aim none"))
    for r in found.get("overlap", ()):
        title = f"{_requests(r.requests)}, {r.policy}"
        lines.append((r.is_same, f"{title}: same tokens by both loops"))
        if r.busy is not None:  # on CPU there is nothing to overlap
            gain = r.plain / r.overlapped
            lines.append((gain >= 1, f"{title}: overlapped loop {gain:.2f}x the plain one, aim 1x"))
            lines.append((r.busy >= 0.97, f"{title}: device busy for {r.busy:.0%} of it, aim 97%"))
    for r in found.get("rounds", ()):
        if r.requests == 1:
            share = r.plain_floor / r.plain
            lines.append((share >= 0.8, f"plain step of one request at {share:.0%} of the floor's speed, aim 80%"))
            if r.busy is not None:
                lines.append((r.busy >= 0.97, f"device busy for {r.busy:.0%} of a round of one request, aim 97%"))
        if r.requests in (1, 32):
            ratio, aim = (r.draft + r.verify) / r.plain, 1.25 if r.requests == 1 else 1.4
            lines.append((ratio <= aim, f"round of {r.requests}: {ratio:.2f}x a plain step, aim at most {aim}x"))
    for r in found.get("decode", ()):
        title = _requests(r.requests)
        for peer, aim in (("transformers generate", 3.0), ("transformers compiled", 1.0)):
            if r.requests == 1 and peer in r.rates:
                ratio = r.rates[PLAIN] / r.rates[peer]
                lines.append((ratio >= aim, f"{title}: plain over {peer} {ratio:.2f}x, aim {aim}x"))
        fixed = [rate for name, rate in r.rates.items() if "@fixed" in name]
        if (ratio := r.over_plain(AUTO)) is not None:
            lines.append((ratio >= 1, f"{title}: auto over off {ratio:.2f}x, aim 1x"))
            if fixed:
                over = r.rates[AUTO] / max(fixed)
                lines.append((over >= 0.98, f"{title}: auto over the best fixed length {over:.2f}x, aim 0.98x"))
    return lines


def show_aims(console: Console, found: Mapping[str, Sequence[Any]]) -> None:
    console.print(table.aims(aims(found)))


def draw(path: Path, found: Mapping[str, Sequence[Any]], about: Mapping[str, Any]) -> None:
    """Passes by their tokens beside the floor, and tokens per second by load."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    for context in dict.fromkeys(r.context for r in found.get("steps", ())):
        rows = sorted((r for r in found["steps"] if r.context == context), key=lambda r: r.tokens)
        line = left.plot([r.tokens for r in rows], [1e3 * r.seconds for r in rows], "o", label=f"context {context}")
        left.plot([r.tokens for r in rows], [1e3 * r.floor for r in rows], "_", color=line[0].get_color())
    left.set(
        xscale="log", yscale="log", xlabel="tokens in the pass", ylabel="ms (dashes: floor)", title="Target passes"
    )
    loads = found.get("decode", ())
    for name in loads[0].rates if loads else ():
        style = "--" if name.startswith("transformers") else "-"
        served = [r for r in loads if name in r.rates]
        right.plot([r.requests for r in served], [r.rates[name] for r in served], style, marker=".", label=name)
    right.set(xscale="log", yscale="log", xlabel="requests", ylabel="tokens/s", title="Decoding, acceptance replayed")
    for axis in (left, right):
        if axis.lines:
            axis.legend(fontsize=6)
    figure.text(0.01, 0.005, ", ".join(f"{k} {v}" for k, v in about.items()), fontsize=5, color="#555555")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _requests(count: int) -> str:
    return "1 request" if count == 1 else f"{count} requests"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"
