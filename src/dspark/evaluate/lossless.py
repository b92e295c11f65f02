"""Speculation promises the target's own text. Put the promise to the test on the engine as it is deployed.

The coupled rule promises the same tokens for the same seed; so does every rule at temperature 0. The rejection rule
promises the same law, which is tested on the joint law of the first tokens over a small sub-vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dspark.engine.engine import Engine
from dspark.engine.text import Prompt
from dspark.evaluate.statistics import TwoSamples, g_test
from dspark.monitor.identity import Difference, LogitsOf, judge
from dspark.types import Generation, SamplingParams

LEAST_P = 1e-4  # of one law test; about one false alarm in ten thousand clean ones
_NUM_KEPT = 4  # tokens of the sub-vocabulary at each position
_NUM_JOINT = 3  # the first comes with the prompt, so drafts decide about the second and third


@dataclass(frozen=True)
class Parting:
    """One text that parts from plain decoding, with both traces."""

    prompt_index: int
    batch: int
    difference: Difference
    prompt_token_ids: list[int]
    token_ids: list[int]
    plain_token_ids: list[int]
    seed: int


@dataclass
class TokenCheck:
    """Texts at one temperature, token by token against plain decoding."""

    temperature: float
    num_texts: int = 0
    num_tokens: int = 0
    num_verified: int = 0
    num_accepted: int = 0
    num_passes: int = 0
    partings: list[Parting] = field(default_factory=list)

    @property
    def num_explained(self) -> int:
        """Differences that rounding in the dtype accounts for."""
        return sum(p.difference.is_explained for p in self.partings)

    @property
    def num_unexplained(self) -> int:
        """Differences that nothing accounts for: bugs."""
        return len(self.partings) - self.num_explained

    @property
    def tau(self) -> float:
        """Tokens committed per target pass, over all texts."""
        return 1 + self.num_accepted / self.num_passes if self.num_passes else 1.0

    def add(self, generation: Generation) -> None:
        """Count a speculative text in."""
        self.num_texts += 1
        self.num_tokens += len(generation.token_ids)
        self.num_passes += len(generation.rounds)
        self.num_verified += sum(r.verified for r in generation.rounds)
        self.num_accepted += sum(r.accepted for r in generation.rounds)

    def as_json(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "texts": self.num_texts,
            "tokens": self.num_tokens,
            "draft_tokens_verified": self.num_verified,
            "draft_tokens_accepted": self.num_accepted,
            "tau": self.tau,
            "identical": self.num_texts - len(self.partings),
            "explained": self.num_explained,
            "unexplained": self.num_unexplained,
            "differences": [
                {"prompt": p.prompt_index, "batch": p.batch, "seed": p.seed, **p.difference.as_json()}
                for p in self.partings
            ],
        }


@dataclass(frozen=True)
class LawCheck:
    """Samples of one prompt's first tokens at one temperature, with and without speculation."""

    temperature: float
    prompt_index: int
    num_samples: int
    num_accepted: int
    test: TwoSamples

    @property
    def is_unexplained(self) -> bool:
        """Whether the two samples are too unlike to come from one law."""
        return self.test.p < LEAST_P

    def as_json(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "prompt": self.prompt_index,
            "samples": self.num_samples,
            "draft_tokens_accepted": self.num_accepted,
            "g": self.test.statistic,
            "degrees": self.test.degrees,
            "p": self.test.p,
        }


def check_tokens(
    speculative: Engine,
    plain: Engine,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    batches: Sequence[int],
    dtype: str,
    logits_of: LogitsOf | None = None,
    raw: bool = False,
) -> TokenCheck:
    """Generate every prompt with both engines and the same seeds, in batches of each of these sizes.

    Plain decoding runs in the largest batch; the text must not depend on that either.
    """
    check = TokenCheck(params.temperature)
    first_seed = params.seed or 0
    each = [replace(params, seed=first_seed + i) for i in range(len(prompts))]
    expected = _in_batches(plain, prompts, each, max(batches), raw)
    for batch in batches:
        for i, (got, want) in enumerate(
            zip(_in_batches(speculative, prompts, each, batch, raw), expected, strict=True)
        ):
            check.add(got)
            found = judge(want.prompt_token_ids, want.token_ids, got.token_ids, each[i], want.seed, dtype, logits_of)
            if found is not None:
                traces = (want.prompt_token_ids, got.token_ids, want.token_ids)
                check.partings.append(Parting(i, batch, found, *traces, want.seed))
    return check


def check_laws(
    speculative: Engine,
    plain: Engine,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    num_samples: int,
    batch: int,
    raw: bool = False,
) -> list[LawCheck]:
    """Sample the first tokens of each prompt many times with both engines; the seeds are not shared."""
    narrow = replace(params, top_k=_NUM_KEPT, max_tokens=_NUM_JOINT, ignore_eos=True, stop=())
    checks = []
    for i, prompt in enumerate(prompts):
        first_seed = (params.seed or 0) + 2 * num_samples * i
        ours = [replace(narrow, seed=first_seed + n) for n in range(num_samples)]
        theirs = [replace(narrow, seed=first_seed + num_samples + n) for n in range(num_samples)]
        got = _in_batches(speculative, [prompt] * num_samples, ours, batch, raw)
        want = _in_batches(plain, [prompt] * num_samples, theirs, batch, raw)
        test = g_test((tuple(g.token_ids) for g in got), (tuple(g.token_ids) for g in want))
        num_accepted = sum(r.accepted for g in got for r in g.rounds)
        checks.append(LawCheck(params.temperature, i, num_samples, num_accepted, test))
    return checks


def _in_batches(
    engine: Engine, prompts: Sequence[Prompt], params: Sequence[SamplingParams], batch: int, raw: bool
) -> list[Generation]:
    generations: list[Generation] = []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        generations += engine.generate(list(prompts[part]), list(params[part]), raw=raw)
    return generations
