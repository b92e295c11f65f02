"""The coupled rule with its real noise: the text is plain decoding's, token for token, whatever was drafted."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from dspark.noise import COUPLED
from dspark.sampling import Draws, KeyedDraws, law
from dspark.types import Draft, Load, Request, Rule, SamplingParams
from dspark.verify import Coupled
from tests.enumeration import TREE, TableDrafter, random_table, step

V = 12
TARGET = random_table(51, V, sharpness=0.5)


class Any:
    """A scheduler that looks at everything, tokens included: a random ancestor-closed part."""

    anticipates = True

    def choose(self, draft: Draft, survival: Tensor, load: Load) -> Tensor:
        keep = draft.real.clone()
        for b, tokens in enumerate(draft.tokens.tolist()):
            rng = random.Random(str(tokens))
            for k in range(len(tokens)):
                parent = k - 1 if draft.parents is None else int(draft.parents[b, k])
                keep[b, k] &= (parent < 0 or bool(keep[b, parent])) and rng.random() < 0.8
        return keep


class Silent:
    feature_layers, length = (), 0

    def propose(self, requests, rule: Rule) -> Draft:
        return Draft.empty(len(requests))

    def release(self, request_id: int) -> None:
        pass


class Repeats(Silent):
    """Prompt lookup: what followed the last token where it occurred before; drafts of different sizes."""

    length = 4

    def propose(self, requests, rule: Rule) -> Draft:
        tokens, sizes = torch.zeros(len(requests), 4, dtype=torch.long), []
        for b, r in enumerate(requests):
            found = [i for i, token in enumerate(r.tokens[:-1]) if token == r.tokens[-1]]
            guess = r.tokens[found[-1] + 1 :][:4] if found else []
            tokens[b, : len(guess)] = torch.tensor(guess, dtype=torch.long)
            sizes.append(len(guess))
        return Draft(tokens, torch.tensor(sizes))


def rotated(shift: int):
    return lambda logits, ordinal: (max(range(V), key=logits.__getitem__) + shift + ordinal) % V


DRAFTERS = {
    "the target itself": TableDrafter(TARGET, (-1, 0, 1)),
    "another table": TableDrafter(random_table(52, V), (-1, 0, 1, 2)),
    "always wrong": TableDrafter(TARGET, (-1, 0), rotated(V // 2)),
    "likeliest": TableDrafter(TARGET, (-1, 0, 1), rotated(0)),
    "tree": TableDrafter(TARGET, TREE, rotated(0)),
    "drawn and picked": TableDrafter(TARGET, TREE, lambda logits, ordinal: None if ordinal == 0 else ordinal),
    "duplicates": TableDrafter(TARGET, (-1, -1, 0, 1, 1), lambda logits, ordinal: None),
    "repeats": Repeats(),
}


def decode(drafter, params: SamplingParams, seeds: list[int], num_tokens: int = 12) -> tuple[list[list[int]], int]:
    """The text of each request, decoded side by side, and how many rounds that took."""
    draws: Draws = KeyedDraws(V)
    requests = [Request(b, [b % V], params, 1, seed=seed) for b, seed in enumerate(seeds)]
    num_rounds = 0
    while running := [r for r in requests if len(r.generated) < num_tokens]:
        num_rounds += 1
        for r, tokens in zip(running, step(running, drafter, Any(), Coupled(draws), TARGET), strict=True):
            r.tokens += tokens
    return [r.generated[:num_tokens] for r in requests], num_rounds


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 1.5])
@pytest.mark.parametrize("name", DRAFTERS)
def test_same_text_as_plain_decoding(name: str, temperature: float) -> None:
    params, seeds = SamplingParams(temperature=temperature), [*range(12), 2**40 + 1, 2**63 - 1]
    plain, plain_rounds = decode(Silent(), params, seeds)
    found, num_rounds = decode(DRAFTERS[name], params, seeds)
    assert found == plain
    assert plain_rounds == 12
    if name == "the target itself":
        assert num_rounds < plain_rounds


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.7, top_p=0.8, frequency_penalty=0.5),
        SamplingParams(top_k=3, repetition_penalty=1.5, presence_penalty=0.2),
        SamplingParams(temperature=0.0, repetition_penalty=2.0, logit_bias={3: 2.0}),
        SamplingParams(temperature=1.5, min_p=0.1),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["another table", "tree", "repeats"])
def test_same_text_with_cuts_and_penalties(name: str, params: SamplingParams) -> None:
    seeds = list(range(8))
    assert decode(DRAFTERS[name], params, seeds)[0] == decode(Silent(), params, seeds)[0]


def test_the_batch_does_not_matter() -> None:
    params = SamplingParams(temperature=0.9)
    together, _ = decode(DRAFTERS["another table"], params, [5, 6, 7])
    for b, seed in enumerate([5, 6, 7]):
        alone = Request(0, [b], params, 1, seed=seed)
        while len(alone.generated) < 12:
            alone.tokens += step([alone], Silent(), Any(), Coupled(KeyedDraws(V)), TARGET)[0]
        assert alone.generated == together[b]


def test_noise_that_is_drawn_again_is_seen() -> None:
    """The harness can fail: positions counted from the anchor give the same token different noise in other rounds."""

    class Relative(KeyedDraws):
        def tokens(self, scores, temperature, seeds, positions, stream):
            return super().tokens(scores, temperature, seeds, [p - min(positions) for p in positions], stream)

    def text(drafter) -> list[int]:
        r, rule = Request(0, [0], SamplingParams(), 1, seed=1), Coupled(Relative(V))
        while len(r.generated) < 12:
            r.tokens += step([r], drafter, Any(), rule, TARGET)[0]
        return r.generated[:12]

    assert text(Silent()) != text(DRAFTERS["the target itself"])


@pytest.mark.parametrize("scale", [0.2, 0.7, 1.5])
def test_coupled_acceptance_is_near_the_best_possible(scale: float) -> None:
    """Between (1 - TV) / (1 + TV) and 1 - TV, within four standard errors."""
    generator, n, vocab_size = torch.Generator().manual_seed(3), 8000, 60
    target = torch.randn(vocab_size, generator=generator) * 2
    draft = target + scale * torch.randn(vocab_size, generator=generator)
    one = torch.ones(n, 1)
    p, q = law(target[None], one[:1])[0], law(draft[None], one[:1])[0]
    tv = 0.5 * float((p - q).abs().sum())
    draws, seeds, positions = KeyedDraws(vocab_size), [11] * n, list(range(n))
    drafted, chosen = (
        draws.tokens(scores[None].expand(n, -1), one, seeds, positions, COUPLED) for scores in (draft, target)
    )
    rate, error = float((drafted == chosen).float().mean()), 4 * 0.5 / n**0.5
    assert (1 - tv) / (1 + tv) - error <= rate <= 1 - tv + error
    independent = float((p * q).sum())
    assert rate > independent + error


def test_noise_ahead_is_the_noise_of_each_draw() -> None:
    """Drafters that draw whole drafts at once draw the tokens that `draft` would have drawn one by one."""
    rule = Coupled(KeyedDraws(V))
    temperatures, length = [0.0, 0.7, 1.5], 4
    requests = [
        Request(b, [b] * (b + 60), SamplingParams(temperature=t), 1, seed=b) for b, t in enumerate(temperatures)
    ]
    noise = rule.noise_ahead(requests, length)
    assert noise is not None
    logits = torch.randn(3, length, V, generator=torch.Generator().manual_seed(0))
    for k in range(length):
        one_by_one, _ = rule.draft(logits[:, k], requests, [[0] * k] * 3)
        assert torch.equal((logits + noise)[:, k].argmax(-1), one_by_one)
    greedy = rule.noise_ahead(requests[:1], length)
    assert greedy is not None
    assert torch.equal((logits[:1] + greedy).argmax(-1), logits[:1].argmax(-1))
    assert rule.noise_ahead([Request(0, [0], SamplingParams(top_p=0.5), 1)], length) is None
