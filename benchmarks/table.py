"""The report in a terminal: what was measured, on what, how sure, and where we lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from benchmarks.identity import Identity
from benchmarks.measure import Section
from benchmarks.summary import Acceptance, Ratio, Row, StepTime

_COLOUR = {"ours": "green", "transformers": "yellow", "vllm": "magenta"}


def _length(section: Section) -> str:
    return f"{min(section.lengths)} to {max(section.lengths)}" if section.lengths else str(section.num_tokens)


def rates(section: Section, rows: Sequence[Row], baselines: Mapping[str, str]) -> Table:
    """One section. baselines: contender -> heading of its column."""
    table = Table(
        title=f"{section.title}, {_length(section)} new tokens each: tokens/s",
        caption=f"medians over {section.num_repeats} interleaved repeats of {len(section.groups)} x "
        f"{section.num_requests} prompts; [ ]: 95 % interval over prompts",
        title_justify="left",
        caption_justify="left",
    )
    domains = sorted({d for row in rows for d in row.by_domain if d != "mixed"})
    table.add_column("contender", no_wrap=True)
    table.add_column("tok/s", justify="right")
    table.add_column("min-max", justify="right")
    for domain in domains:
        table.add_column(domain, justify="right")
    for heading in baselines.values():
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            Text(row.contender, style=_COLOUR.get(row.family, "")),
            number(row.rate),
            f"{number(row.low)}-{number(row.high)}",
            *(number(row.by_domain[d]) if d in row.by_domain else "" for d in domains),
            *(ratio(row.versus[b]) if b in row.versus else "" for b in baselines),
        )
    return table


def acceptance(by_drafter: Mapping[str, Acceptance], title: str) -> Table:
    deepest = max((len(a.by_position) for a in by_drafter.values()), default=0)
    domains = sorted({d for a in by_drafter.values() for d in a.tau_by_domain if d != "mixed"})
    table = Table(
        title=title,
        title_justify="left",
        caption="k: accepted at position k, of those that reached it",
        caption_justify="left",
    )
    for heading in ("drafter", "tau", *domains, *(str(k + 1) for k in range(deepest)), "passes"):
        table.add_column(heading, justify="left" if heading == "drafter" else "right", no_wrap=heading == "drafter")
    for name, a in by_drafter.items():
        positions = [f"{hits / reached:.0%}" if reached else "" for hits, reached in a.by_position]
        positions += [""] * (deepest - len(positions))
        by_domain = [f"{a.tau_by_domain[d]:.2f}" if d in a.tau_by_domain else "" for d in domains]
        table.add_row(name, f"{a.tau:.2f}", *by_domain, *positions, str(a.num_rounds))
    return table


def step_times(by_contender: Mapping[str, StepTime], title: str) -> Table:
    phases = list(dict.fromkeys(p for s in by_contender.values() for p in s.phases))
    table = Table(
        title=title,
        title_justify="left",
        caption="milliseconds per decoding step; overhead: the share that runs no model",
        caption_justify="left",
    )
    for heading in ("contender", *phases, "step", "overhead"):
        table.add_column(heading, justify="left" if heading == "contender" else "right", no_wrap=heading == "contender")
    for name, s in by_contender.items():
        cells = [f"{s.phases[p]:.2f}" if p in s.phases else "" for p in phases]
        table.add_row(name, *cells, f"{s.total:.2f}", f"{s.overhead:.0%}")
    return table


def identities(results: Sequence[tuple[str, Identity]], reference: str) -> Group:
    """results: (what was run, how it compares)."""
    lines = [Text(f"Token for token equal to {reference}:", style="bold")]
    for label, r in results:
        line = f"  {label}, {r.contender}: {r.num_identical} of {r.num_texts} texts"
        if r.num_identical < r.num_texts:
            gap = "" if r.widest_gap is None else f" (widest gap {r.widest_gap:.3f} logits in float32)"
            line += f"; {r.num_explained} differences explained by rounding, {r.num_unexplained} not{gap}"
            line += f", {r.num_unjudged} not looked up" if r.num_unjudged else ""
        lines.append(Text(line, style="red" if r.num_unexplained else ""))
    return Group(*lines)


def losses(lines: Sequence[str]) -> Group:
    if not lines:
        return Group(Text("Where we lose: nowhere in this run.", style="bold"))
    return Group(Text("Where we lose:", style="bold red"), *(Text(f"  {line}") for line in lines))


def aims(lines: Sequence[tuple[bool, str]]) -> Group:
    shown = [
        Text(f"  {'reached' if is_reached else 'MISSED '}  {line}", style="" if is_reached else "red")
        for is_reached, line in lines
    ]
    return Group(Text("Aims:" if shown else "Aims: none that this run can judge.", style="bold"), *shown)


def number(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def ratio(r: Ratio) -> str:
    return f"{r.value:.2f}x" if r.low is None else f"{r.value:.2f}x [{r.low:.2f}-{r.high:.2f}]"


def show(console: Console, *parts: object) -> None:
    for part in parts:
        console.print(part)
        console.print()
