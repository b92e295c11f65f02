"""Collected outcomes are what full-length verification decided, and nothing that it did not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from dspark import Engine, InvalidRequest, SamplingParams
from dspark.evaluate.outcomes import collect
from dspark.types import Draft, Request, Rule
from engine.models import VOCAB_SIZE, random_target

LENGTH = 4
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]


class Scripted:
    """Drafts what plain decoding says, wrong from depth position % (LENGTH + 1) + 1 on; its confidence says where it is."""

    feature_layers: tuple[int, ...] = ()
    length = LENGTH

    def __init__(self, texts: Sequence[Sequence[int]], confident: bool = True) -> None:
        self.texts, self.confident = texts, confident

    def propose(self, requests: Sequence[Request], rule: Rule) -> Draft:
        tokens, confidence = [], []
        for request in requests:
            text = next(t for t in self.texts if list(t[: len(request.tokens)]) == request.tokens)
            place = len(request.tokens)
            ahead = [*text[place : place + LENGTH], *[0] * LENGTH][:LENGTH]
            right = place % (LENGTH + 1)
            tokens.append([t if k < right else (t + 1) % VOCAB_SIZE for k, t in enumerate(ahead)])
            confidence.append([place / 1000] * LENGTH)
        sizes = torch.full((len(requests),), LENGTH)
        return Draft(torch.tensor(tokens), sizes, torch.tensor(confidence) if self.confident else None)

    def release(self, request_id: int) -> None:
        pass


def test_outcomes_are_the_rounds_that_had_room(tmp_path: Path) -> None:
    target = random_target(tmp_path)
    params = SamplingParams(max_tokens=24, seed=3)
    texts = []
    for i, prompt in enumerate(PROMPTS):
        (plain,) = Engine(target).generate([prompt], SamplingParams(max_tokens=40, seed=3 + i))
        texts.append([*prompt, *plain.token_ids])
    outcomes = collect(target, Scripted(texts), PROMPTS, params, max_num_seqs=2, domains=["a", "b", "a"])
    seen = zip(
        (outcomes.confidence[:, 0] * 1000).round().int().tolist(),
        outcomes.survived.sum(1).tolist(),
        outcomes.prompts.tolist(),
        strict=True,
    )
    expected = []
    for i, prompt in enumerate(PROMPTS):
        place = len(prompt) + 1  # one token comes from reading the prompt
        while place + LENGTH < len(prompt) + 24:  # a round with less room is cut short and says nothing
            right = place % (LENGTH + 1)
            expected.append((place, right, i))
            place += right + 1
    assert sorted(seen, key=lambda s: (s[2], s[0])) == expected and len(expected) > 15
    assert outcomes.known.all() and outcomes.domains == ("a", "b", "a")
    assert {right for _, right, _ in expected} == {0, 1, 2, 3, 4}


def test_past_the_end_of_a_text_nothing_is_known(tmp_path: Path) -> None:
    target = random_target(tmp_path)
    (plain,) = Engine(target).generate([PROMPTS[0]], SamplingParams(max_tokens=40, seed=3))
    texts = [[*PROMPTS[0], *plain.token_ids]]
    full = collect(target, Scripted(texts), PROMPTS[:1], SamplingParams(max_tokens=40, seed=3))
    places = (full.confidence[:, 0] * 1000).round().int().tolist()
    chosen = next(i for i, n in enumerate(full.survived.sum(1).tolist()) if n >= 3)
    end = texts[0][places[chosen] + 1]  # the second token of a draft whose third is right, too
    first = texts[0].index(end, len(PROMPTS[0]))
    assert first == places[chosen] + 1, "choose another seed: the end token comes earlier in this text"
    cut = collect(target, Scripted(texts), PROMPTS[:1], SamplingParams(max_tokens=40, seed=3, stop_token_ids=(end,)))
    assert cut.known[-1].tolist() == [True, True, False, False] and cut.known[:-1].all()
    assert len(cut.prompts) == chosen + 1


def test_a_drafter_without_confidences_is_refused(tmp_path: Path) -> None:
    target = random_target(tmp_path)
    (plain,) = Engine(target).generate([PROMPTS[0]], SamplingParams(max_tokens=12, seed=0))
    drafter = Scripted([[*PROMPTS[0], *plain.token_ids]], confident=False)
    with pytest.raises(InvalidRequest, match="no confidences"):
        collect(target, drafter, PROMPTS[:1], SamplingParams(max_tokens=12, seed=0))
