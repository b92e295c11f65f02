"""Is the fast text the same text, and if not, can rounding be the reason?

In float32 any difference is a bug. In bfloat16 the logits of one token depend a little on how many are computed
together, so two nearly equal tokens may change places: such a difference is *explained* if float32 logits put the two
closer together than rounding can tell apart. What follows the first difference is another text and is not compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dspark.noise import COUPLED, gumbel
from dspark.sampling import shape_logits
from dspark.target.target import Target
from dspark.types import Request, SamplingParams, Span

# Each of the two runs rounds on its own. The gap between the best two logits of a bfloat16 pass was off by up to 1.1 of
# the dtype's spacing at the size of the logits (embedded target, 8 built-in prompts, every position); so twice that.
_SPACINGS = 2.0

LogitsOf = Callable[[Sequence[int]], Tensor]  # token ids -> [V], what the target gives the next token, in float32


@dataclass(frozen=True)
class Difference:
    """The first position at which a text parts from plain decoding; a token of None: that text had ended.

    gap        between the two tokens where they were chosen, in logits over temperature, in float32; None: not looked up
    tolerance  what rounding in the target's dtype can turn there
    """

    position: int
    token_id: int | None
    plain_token_id: int | None
    gap: float | None = None
    tolerance: float = 0.0

    @property
    def is_explained(self) -> bool:
        """Whether rounding in the dtype can turn this pair of tokens."""
        return self.gap is not None and self.gap <= self.tolerance

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "explained": self.is_explained}


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Where two texts part: the first differing position, or the end of the shorter one."""
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    return min(len(a), len(b)) if at is None and len(a) != len(b) else at


def tolerance(dtype: str, size: float, temperature: float) -> float:
    """The gap that rounding in the dtype can close, in logits over temperature. Nothing is excused in float32."""
    if dtype == "float32":
        return 0.0
    return _SPACINGS * torch.finfo(getattr(torch, dtype)).eps * size / (temperature or 1.0)


def judge(
    prompt: Sequence[int],
    plain: Sequence[int],
    token_ids: Sequence[int],
    params: SamplingParams,
    seed: int,
    dtype: str,
    logits_of: LogitsOf | None,
) -> Difference | None:
    """Compare token_ids with plain decoding of the same prompt, parameters and seed; None: they are identical.

    Without logits_of no difference is explained. In float32 none can be, so it is not asked.
    """
    at = first_difference(token_ids, plain)
    if at is None:
        return None
    ours = token_ids[at] if at < len(token_ids) else None
    theirs = plain[at] if at < len(plain) else None
    if ours is None or theirs is None or dtype == "float32" or logits_of is None:
        return Difference(at, ours, theirs)
    context = [*prompt, *plain[:at]]
    logits = logits_of(context)
    request = Request(-1, context, params, num_prompt_tokens=len(prompt), seed=seed)
    allowed = tolerance(dtype, float(logits.abs().max()), params.temperature)
    return Difference(at, ours, theirs, gap_between(logits, ours, theirs, request), allowed)


def gap_between(logits: Tensor, first: int, other: int, request: Request) -> float:
    """How far apart two candidates for a request's next token are, noise of the coupled rule included.

    logits [V]. A token that top-k, top-p or min-p cuts off in float32 is as far away as the last one that is kept.
    """
    scores, temperature = shape_logits(logits.float()[None], [request], [[]])
    divisor = float(temperature) or 1.0
    cut = [float(logits[t]) for t in (first, other) if math.isinf(float(scores[0, t]))]
    if cut:
        last_kept = float(logits[~scores[0].isinf()].min())
        return max(last_kept - logit for logit in cut) / divisor
    noisy = scores[0] / divisor
    if request.params.temperature > 0:
        noisy = noisy + gumbel(request.seed, len(request.tokens), 1, len(logits), COUPLED, logits.device)[0]
    return abs(float(noisy[first] - noisy[other]))


def logits_by_model(model: torch.nn.Module) -> LogitsOf:
    """model: the target in float32, as transformers has it."""

    @torch.no_grad()
    def logits_of(context: Sequence[int]) -> Tensor:
        device = next(model.parameters(), torch.empty(0)).device
        logits: Tensor = model(torch.tensor([list(context)], device=device)).logits[0, -1]
        return logits.float()

    return logits_of


def logits_by_target(target: Target) -> LogitsOf:
    """target: loaded in float32, over a slot cache of its own."""

    @torch.no_grad()
    def logits_of(context: Sequence[int]) -> Tensor:
        span = Span(-1, 0, list(context), num_logits=1)
        try:
            return target.extend([span], ()).logits[-1].float()
        finally:
            target.release(-1)

    return logits_of
