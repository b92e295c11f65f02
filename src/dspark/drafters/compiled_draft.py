"""A block drafter's usual step, compiled: a graph for one request, one for more."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from dspark.drafters.block_step import Step
from dspark.target.captured import Outputs
from dspark.target.compiled import frozen_weights
from dspark.target.direct import Direct
from dspark.target.kept_graphs import KeptGraphs

_log = logging.getLogger(__name__)


class CompiledDraft:
    """Draft tokens and confidences of a Step that has two features or more, and news: of one request two or more, of many
    always as many as they can bring at most.

    run   what is compiled: (step, noise [B, K, V]) -> tokens [B, K], confidence [B, K]; tensors only
    kept  where its graphs are kept
    """

    def __init__(
        self, run: Callable[[Step, Tensor], Outputs], device: torch.device, kept: KeptGraphs | None = None
    ) -> None:
        def function(step: Step, noise: Tensor) -> Outputs:
            for tensor in (*step.keys, *step.values):  # two sizes instead of two for each
                torch._check(tensor.shape[0] == step.keys[0].shape[0])
                torch._check(tensor.shape[1] == step.keys[0].shape[1])
            return run(step, noise)

        self._run, self._device = run, device
        self._graphs = {
            many: Direct(function, f"draft for {'many' if many else 'one'}", kept) for many in (False, True)
        }
        self._built: set[tuple[bool, torch.Size]] = set()  # steps that a graph has been called for

    def __call__(self, step: Step, noise: Tensor) -> Outputs:
        """The first call of a kind compiles, which takes seconds; what does not compile runs as it is from then on."""
        if not self._graphs:
            return self._run(step, noise)
        many = step.each.shape[1] > 1
        graph, kind = self._graphs[many], (many, step.keys[0].shape)
        if kind in self._built:
            return graph(kind, step=step, noise=noise)
        # Inputs of their own: a view of another tensor, or one that begins elsewhere in it, would need another graph.
        step = step._replace(**{name: getattr(step, name).clone() for name in ("features", "news", "each")})
        for tensor in (*step.keys, *step.values):
            torch._dynamo.maybe_mark_dynamic(tensor, (0, 1))
        torch._dynamo.maybe_mark_dynamic(step.features, 0)
        torch._dynamo.maybe_mark_dynamic(step.news, 1)
        if step.mask is not None:
            torch._dynamo.maybe_mark_dynamic(step.mask, 3)
        if many:
            torch._dynamo.maybe_mark_dynamic(step.each, 1)
            for tensor in (noise,) if step.mask is None else (noise, step.mask):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        self._built.add(kind)
        try:
            with frozen_weights(self._device):
                return graph(kind, step=step, noise=noise)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # the compiler's own errors all derive from it
            _log.warning(
                "the drafter runs uncompiled: %s", (str(error).strip() or type(error).__name__).splitlines()[0]
            )
            self._graphs.clear()
            return self._run(step, noise)
