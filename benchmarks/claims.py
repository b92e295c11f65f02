"""What a run shows against what was promised: where peers are faster, and which aims are reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.contenders import PLAIN
from benchmarks.measure import Section
from benchmarks.summary import Acceptance, Row, StepTime, fastest

DSPARK = "ours: dspark"


@dataclass(frozen=True)
class Result:
    """A section with what was made of it."""

    section: Section
    rows: list[Row]
    acceptance: dict[str, Acceptance]
    step_times: dict[str, StepTime]

    def rate(self, contender: str) -> float | None:
        return next((r.rate for r in self.rows if r.contender == contender), None)


def losses(results: Sequence[Result]) -> list[str]:
    """Every peer that beats us, and drafters of ours that slow us down.

    All peers are held against DSpark, those that do not draft also against our plain decoding.
    """
    lines = []
    for result in results:
        for row in result.rows:
            if row.family == "ours":
                rivals = [] if row.contender == PLAIN else [PLAIN]
                lines += [
                    f"{result.section.title}: {row.contender} is slower than {PLAIN}, {_against(row.rate, plain)}"
                    for plain in map(result.rate, rivals)
                    if plain is not None and row.rate < plain
                ]
                continue
            rivals = [DSPARK] if row.contender in result.section.speculative else [PLAIN, DSPARK]
            for rival in rivals:
                own = result.rate(rival)
                if own is not None and own < row.rate:
                    lines.append(
                        f"{result.section.title}: {rival} is slower than {row.contender}, {_against(own, row.rate)}"
                    )
    return lines


def _against(own: float, other: float) -> str:
    return f"{own:,.0f} against {other:,.0f} tok/s ({own / other:.2f}x)"


# requests side by side -> how many times vLLM's best
_VLLM_AIMS = {1: 2.5, 8: 1.5, 32: 1.0}


def aims(results: Sequence[Result]) -> list[tuple[bool, str]]:
    """(reached, what) for each aim that this run can judge."""
    lines: list[tuple[bool, str]] = []
    for result in results:
        dspark, plain, title = result.rate(DSPARK), result.rate(PLAIN), result.section.title
        if result.section.num_requests == 1:
            for name in result.section.families:
                if name.partition("@")[0] == DSPARK:
                    lines += _single_request_aims(result, name)
        best = fastest(result.rows, "vllm")
        if best is not None and dspark is not None and result.section.num_requests in _VLLM_AIMS:
            aim = _VLLM_AIMS[result.section.num_requests]
            lines.append(_judged(f"{title}: DSpark over vLLM's best ({best.contender})", dspark / best.rate, aim))
        best_plain = max(
            (
                r.rate
                for r in result.rows
                if r.family == "transformers" and r.contender not in result.section.speculative
            ),
            default=None,
        )
        if best_plain is not None and plain is not None:
            lines.append(
                _judged(f"{title}: our plain decoding over transformers' best greedy generate", plain / best_plain, 1.0)
            )
    return lines


def _single_request_aims(result: Result, name: str) -> list[tuple[bool, str]]:
    """Of DSpark with one scheduler."""
    lines = []
    dspark, plain, title = result.rate(name), result.rate(PLAIN), result.section.title
    whose = name.replace(DSPARK, "DSpark")
    if dspark is not None and plain is not None:
        lines.append(_judged(f"{title}: {whose} over our plain decoding", dspark / plain, 2.0))
    best = fastest(result.rows, "transformers")
    if dspark is not None and best is not None:
        lines.append(_judged(f"{title}: {whose} over transformers' best ({best.contender})", dspark / best.rate, 3.0))
    if (step := result.step_times.get(name)) is not None:
        lines.append(
            (step.overhead <= 0.15, f"{title}: overhead of a {whose} step {step.overhead:.0%}, aim at most 15%")
        )
    if result.section.temperature == 1 and (accepted := result.acceptance.get(name)) is not None:
        lines.append((accepted.tau >= 2.5, f"{title}: tau of {whose} {accepted.tau:.2f}, aim at least 2.50"))
        if (other := result.acceptance.get("ours: dflash")) is not None:
            lines.append(
                (
                    accepted.tau > other.tau,
                    f"{title}: tau of {whose} {accepted.tau:.2f}, aim above DFlash's {other.tau:.2f}",
                )
            )
    return lines


def _judged(what: str, value: float, aim: float) -> tuple[bool, str]:
    return value >= aim, f"{what}: {value:.2f}x, aim {aim:g}x"
