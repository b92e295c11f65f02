"""The comparison of drafters as a table and as plots, in the style of the paper's Table 1 and Figures 2, 3 and 4."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.drafter_results import Comparison
from benchmarks.plot import require_matplotlib

BASELINES = ("dflash", "eagle3", "reference")


def table(found: Comparison, over: Sequence[str] = BASELINES) -> str:
    """Markdown: tau of every drafter by domain, and its gain over those of `over` that took part."""
    baselines = [name for name in over if name in found.names]
    heads = ["tau", "layers", "parameters", *found.num_prompts, "mean", *(f"over {name}" for name in baselines)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name in found.names:
        run = found.runs[name][0]
        cells = [name, str(run.num_layers), f"{run.num_parameters / 1e6:.2f} M"]
        cells += [str(found.tau(name, domain)) for domain in found.num_prompts] + [str(found.tau(name))]
        cells += [found.ratio(name, other).percent if other != name else "" for other in baselines]
        lines.append("| " + " | ".join(cells) + " |")
    run = found.runs[found.names[0]][0]
    prompts = ", ".join(f"{num} {domain}" for domain, num in found.num_prompts.items())
    lines += [
        "",
        f"{run.steps} steps, {run.tokens:,} tokens, {len(found.seeds)} seed(s); prompts: {prompts}; T = 1, drafts of "
        f"{found.length}. [ ]: 95 %, bootstrap over prompts and, from two on, seeds.",
    ]
    return "\n".join(lines) + "\n"


def save_plots(found: Comparison, folder: Path) -> None:
    """acceptance.png, depth.png and length.png."""
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for name, draw, columns in (
        ("acceptance", _acceptance, len(found.num_prompts)),
        ("depth", _depth, 1),
        ("length", _length, len(found.num_prompts)),
    ):
        figure, axes = pyplot.subplots(1, columns, figsize=(4 * columns + 2, 4), squeeze=False, sharey=True)
        draw(found, axes[0])
        for axis in axes[0]:
            axis.spines[["top", "right"]].set_visible(False)
        if columns > 1:
            axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        figure.tight_layout()
        figure.savefig(folder / f"{name}.png", dpi=100)
        pyplot.close(figure)


def _acceptance(found: Comparison, axes: Any) -> None:
    """Figure 2: does acceptance decay along the block?"""
    for axis, domain in zip(axes, found.num_prompts, strict=True):
        for name in found.names:
            axis.plot(range(1, found.length + 1), found.acceptance(name, domain), marker="o", ms=3, label=name)
        axis.set(title=domain, xlabel="position in the draft", xticks=range(1, found.length + 1))
    axes[0].set_ylabel("accepted, of those that reached it")


def _depth(found: Comparison, axes: Any) -> None:
    """Figure 3: what more layers bring."""
    for name in found.names:
        tau, layers = found.tau(name), found.runs[name][0].num_layers
        axes[0].errorbar([layers], [tau.value], [[tau.value - tau.low], [tau.high - tau.value]], fmt="o", capsize=3)
        axes[0].annotate(name, (layers, tau.value), xytext=(6, 0), textcoords="offset points", fontsize=8)
    axes[0].set(xlabel="draft layers", ylabel="tau, mean of the domains", xticks=[1, 2, 3], xlim=(0.8, 3.8))


def _length(found: Comparison, axes: Any) -> None:
    """Figure 4: the gain over DFlash by length of the draft."""
    lengths = range(1, found.length + 1)
    baseline = next((name for name in BASELINES if name in found.names), found.names[0])
    for axis, domain in zip(axes, found.num_prompts, strict=True):
        for name in found.names:
            gains = [100 * found.ratio(name, baseline, domain, k).value - 100 for k in lengths]
            axis.plot(lengths, gains, marker="o", ms=3, label=name)
        axis.set(title=domain, xlabel="tokens drafted")
    axes[0].set_ylabel(f"gain in tau over {baseline}, %")
