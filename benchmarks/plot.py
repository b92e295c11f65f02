"""The same report as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import Section
from benchmarks.summary import Row

_COLOUR = {"ours": "#2a9d5c", "transformers": "#d9a514", "vllm": "#a04bbd"}


def require_matplotlib() -> None:
    """Asked before anything is measured, so that nothing is measured in vain."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib, or leave --plot out") from None


def save(path: Path, sections: Sequence[tuple[Section, Sequence[Row]]], subtitle: str) -> None:
    """One panel of bars per section: medians, with a line from the least to the most."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [max(2, len(rows)) * 0.32 + 0.8 for _, rows in sections]
    figure, axes = pyplot.subplots(
        len(sections), 1, figsize=(8, sum(heights) + 0.6), height_ratios=heights, squeeze=False
    )
    for axis, (section, rows) in zip(axes[:, 0], sections, strict=True):
        names = [r.contender for r in rows]
        rates = [r.rate for r in rows]
        spread = [[r.rate - r.low for r in rows], [r.high - r.rate for r in rows]]
        axis.barh(
            names, rates, xerr=spread, color=[_COLOUR.get(r.family, "grey") for r in rows], ecolor="#444444", capsize=2
        )
        axis.invert_yaxis()
        axis.set_xlabel("tokens/s")
        axis.set_title(section.title, loc="left", fontsize=10)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.text(0.01, 0.005, subtitle, fontsize=6, color="#555555")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
