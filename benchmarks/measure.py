"""Taking turns: every contender does the same work on the same prompts, in an order that favours none.

Time on a shared machine drifts, so contenders alternate prompt by prompt, start at a different place each time, and run
backwards every second time (ABBA). Ratios are then taken between runs that lie seconds apart.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from benchmarks.prompts import EncodedPrompt


@dataclass
class Run:
    """What one contender did with one group of prompts.

    seconds   wall time of generation: loading, tokenising and pipes are not in it
    rounds    per request (drafted, verified, accepted) of each target pass; only our engine reports them
    phases    seconds by phase, summed over the decoding steps; only our engine reports them
    """

    token_ids: list[list[int]]
    seconds: float
    seeds: list[int] = field(default_factory=list)
    rounds: list[list[tuple[int, int, int]]] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
    num_steps: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids))


class Contender(Protocol):
    """One way of generating, loaded once.

    family          ours, transformers or vllm
    max_requests    how many it can serve side by side
    is_speculative  whether it drafts
    """

    name: str
    family: str
    max_requests: int
    is_speculative: bool

    def run(self, prompts: Sequence[Sequence[int]], num_tokens: int, temperature: float, seed: int) -> Run: ...

    def close(self) -> None: ...


@dataclass
class Sample:
    contender: str
    group: int
    repeat: int
    domain: str
    run: Run


@dataclass
class Section:
    """One comparison: the same groups of prompts at one temperature, for some contenders.

    num_tokens  new tokens per request, at most
    lengths     per group, where texts have lengths of their own
    """

    num_requests: int
    temperature: float
    num_tokens: int
    families: dict[str, str]  # contender -> family, in the order of the table
    groups: list[list[EncodedPrompt]]
    speculative: frozenset[str] = frozenset()
    samples: list[Sample] = field(default_factory=list)
    num_repeats: int = 0
    lengths: list[int] = field(default_factory=list)

    def num_tokens_of(self, group: int) -> int:
        return self.lengths[group] if self.lengths else self.num_tokens

    @property
    def title(self) -> str:
        noun = "request" if self.num_requests == 1 else "requests"
        return f"{self.num_requests} {noun}, temperature {self.temperature:g}"

    def of(self, contender: str) -> list[Sample]:
        return [s for s in self.samples if s.contender == contender]

    def drop_unfinished(self) -> None:
        """Cut short, it keeps whole repeats; of a first one that was not finished, the prompts that everybody read."""
        if not self.num_repeats:
            num_whole = len(self.samples) // len(self.families)
            self.groups, self.lengths = self.groups[:num_whole], self.lengths[:num_whole]
            self.num_repeats = min(1, num_whole)
        self.samples = self.samples[: self.num_repeats * len(self.groups) * len(self.families)]


def leave_alone() -> None:
    """Spare garbage collections what is loaded by now: looking through models and libraries takes tenths of a second, from
    whoever's turn it is.
    """
    gc.collect()
    gc.freeze()


def turn_order(items: Sequence[Any], group: int, repeat: int) -> list[Any]:
    """Another one comes first for each group; each repeat runs a group in the opposite order of the one before."""
    start = (group + repeat // 2) % len(items)
    rotated = [*items[start:], *items[:start]]
    return rotated[::-1] if (group + repeat) % 2 else rotated


def measure(
    section: Section,
    contenders: Sequence[Contender],
    num_repeats: int,
    deadline: float = float("inf"),
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Fills `section.samples`.

    deadline: on the clock of time.monotonic(); a repeat that would not end before it is not begun, except the first.
    """
    for contender in contenders:  # untimed: first calls allocate, compile and fill caches
        progress(f"{section.title}: warming up {contender.name}")
        contender.run([p.token_ids for p in section.groups[0]], section.num_tokens_of(0), section.temperature, 0)
    longest = 0.0
    for repeat in range(num_repeats):
        if repeat and time.monotonic() + longest > deadline:
            break
        began = time.monotonic()
        for index, group in enumerate(section.groups):
            for contender in turn_order(contenders, index, repeat):
                place = f"repeat {repeat + 1}/{num_repeats}, prompts {index + 1}/{len(section.groups)}"
                progress(f"{section.title}: {place}, {contender.name}")
                num_tokens = section.num_tokens_of(index)
                run = contender.run([p.token_ids for p in group], num_tokens, section.temperature, seed=index)
                check_equal_work(contender.name, run, len(group), num_tokens)
                section.samples.append(Sample(contender.name, index, repeat, domain_of(group), run))
        section.num_repeats = repeat + 1
        longest = max(longest, time.monotonic() - began)


def domain_of(group: Sequence[EncodedPrompt]) -> str:
    domains = {p.domain for p in group}
    return domains.pop() if len(domains) == 1 else "mixed"


def check_equal_work(name: str, run: Run, num_requests: int, num_tokens: int) -> None:
    lengths = [len(t) for t in run.token_ids]
    if lengths != [num_tokens] * num_requests:
        raise RuntimeError(
            f"{name} should have written {num_tokens} tokens for each of {num_requests} prompts; it wrote {lengths}"
        )
