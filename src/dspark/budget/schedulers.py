"""Prefix schedulers by name, as users say them."""

from __future__ import annotations

from collections.abc import Callable

from dspark.budget.baselines import StartupTable, TokensPerBatch
from dspark.budget.prefix_scheduler import ConfidenceThreshold, FixedLength
from dspark.budget.sparing import Sparing
from dspark.budget.throughput import EarlyStop, Lagged, Optimal, StepCost
from dspark.errors import InvalidConfiguration
from dspark.types import PrefixScheduler

AUTO = "auto"
BY_COST: dict[str, Callable[[StepCost], PrefixScheduler]] = {
    "algorithm1": EarlyStop,
    "lagged": Lagged,
    "optimal": Optimal,
    "tokens-per-batch": TokensPerBatch,
    "startup-table": StartupTable,
}


def make_scheduler(name: str | PrefixScheduler, cost: StepCost, allows_anticipation: bool) -> PrefixScheduler:
    """The scheduler of this name, or an object that already is one. Raises InvalidConfiguration.

    fixed:7  threshold:0.6  algorithm1  lagged  optimal  tokens-per-batch  startup-table
    auto: the best that the acceptance rule stays lossless under, `optimal` or `lagged`, as often as that pays
    """
    scheduler = _named(name, cost, allows_anticipation) if isinstance(name, str) else name
    if (
        isinstance(scheduler, type)
        or not callable(getattr(scheduler, "choose", None))
        or not hasattr(scheduler, "anticipates")
    ):
        raise InvalidConfiguration(
            f"a scheduler is a name or an object with `anticipates` and choose(draft, survival, load); got {scheduler!r:.80}"
        )
    if scheduler.anticipates and not allows_anticipation:
        raise InvalidConfiguration(
            f"{type(scheduler).__name__} looks at draft tokens to decide how many to verify, which biases the "
            "rejection rule (paper, Appendix A): use rule='coupled', or a scheduler that does not anticipate"
        )
    return scheduler


def _named(name: str, cost: StepCost, allows_anticipation: bool) -> PrefixScheduler:
    if name == AUTO:
        return Sparing(Optimal(cost) if allows_anticipation else Lagged(cost), cost)
    if name in BY_COST:
        return BY_COST[name](cost)
    kind, _, value = name.partition(":")
    try:
        if kind == "fixed" and int(value) >= 0:
            return FixedLength(int(value))
        if kind == "threshold" and 0 <= float(value) <= 1:
            return ConfidenceThreshold(float(value))
    except ValueError:
        pass  # a value that is no number ends in the same message as an unknown name
    raise InvalidConfiguration(
        f"scheduler must be auto, fixed:LENGTH, threshold:CONFIDENCE (0 to 1) or one of {', '.join(BY_COST)}; got {name!r}"
    )
