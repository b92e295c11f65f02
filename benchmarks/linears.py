"""Linear layers of a small model in bfloat16 on CPU: our kernel against the library's, with and without packed weights.

    python -m benchmarks.linears --threads 1

Microseconds per layer, the least quarter of many turns. A turn runs a row of layers with weights of their own, as a model
does, so that weights come from where a model's would: not all of them from the nearest cache.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from benchmarks.report import environment
from dspark.target import native


def microseconds(run: Callable[[int], object], num_layers: int, turns: int) -> float:
    """Of one layer, by the first quartile over turns."""
    taken = []
    for _ in range(turns):
        start = time.perf_counter()
        for layer in range(num_layers):
            run(layer)
        taken.append(time.perf_counter() - start)
    return 1e6 * sorted(taken)[turns // 4] / num_layers


def compare(width: int, inner: int, rows: int, num_layers: int, turns: int) -> tuple[float, float, float]:
    """Microseconds of torch's linear layer, the library's over packed weights, ours; they must agree."""
    x = torch.randn(rows, inner).bfloat16()
    weights = [torch.randn(width, inner).bfloat16() / inner**0.5 for _ in range(num_layers)]
    reordered = [torch.ops.mkldnn._reorder_linear_weight(w, rows) for w in weights]
    packed = [torch.ops.dspark.pack_linear(w, None) for w in weights]

    def ours(layer: int) -> Tensor:
        return torch.ops.dspark.small_linear(x, packed[layer], width)

    def library(layer: int) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, reordered[layer], None, "none", [], "")

    torch.testing.assert_close(ours(0), library(0), rtol=2**-6, atol=2**-6)
    plain = microseconds(lambda layer: F.linear(x, weights[layer]), num_layers, turns)
    return plain, microseconds(library, num_layers, turns), microseconds(ours, num_layers, turns)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    parser.add_argument("--layers", type=int, default=40, help="with weights of their own (default 40)")
    parser.add_argument("--turns", type=int, default=60, help="default 60")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not native.load() or native.small_linear is None:
        parser.exit(1, "no compiler, or a processor without bfloat16 dot products\n")
    table = Table("width x inner", "rows", "torch, us", "oneDNN, packed, us", "ours, us", "ours faster than packed")
    for width, inner in ((512, 256), (1536, 256), (256, 768), (2048, 2048)):
        for rows in (1, 8, 32, 256):
            plain, library, ours = compare(width, inner, rows, options.layers, options.turns)
            figures = f"{plain:.1f}", f"{library:.1f}", f"{ours:.1f}", f"{library / ours:.2f}x"
            table.add_row(f"{width} x {inner}", str(rows), *figures)
    console = Console()
    console.print(table)
    console.print(environment())


if __name__ == "__main__":
    main()
