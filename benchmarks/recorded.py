"""Texts with what would have been drafted at every place of them.

Under the coupled rule a text does not depend on what is drafted or verified, and a draft depends on the text before it
alone. So drafts recorded once at every anchor replay every scheduler with any beliefs, exactly.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dspark import Engine, SamplingParams
from dspark.budget.calibration import Outcomes
from dspark.target.target import Target
from dspark.types import Draft, Drafter, Request, Rule


@dataclass(frozen=True)
class Text:
    """One answer of n tokens; its anchors are tokens 0 .. n - 2.

    prompt      how many tokens came before it
    confidence  of the draft at each anchor, [n - 1, K]
    accepted    how many of that draft's tokens are the text's own, [n - 1]
    has_ended   by itself, not by the limit of tokens
    """

    domain: str
    prompt: int
    confidence: list[list[float]]
    accepted: list[int]
    has_ended: bool


class Recorder:
    """A drafter that remembers what another one proposed."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter, self.feature_layers, self.length = drafter, drafter.feature_layers, drafter.length
        self.drafts: dict[tuple[int, int], tuple[list[int], list[float]]] = {}  # (request, generated tokens)

    def propose(self, requests: Sequence[Request], rule: Rule) -> Draft:
        draft = self.drafter.propose(requests, rule).on_host()
        assert draft.confidence is not None, "a drafter with a confidence head is needed"
        for request, tokens, confidence in zip(requests, draft.tokens.tolist(), draft.confidence.tolist(), strict=True):
            self.drafts[request.id, len(request.generated)] = (tokens, [round(c, 7) for c in confidence])
        return draft

    def release(self, request_id: int) -> None:
        self.drafter.release(request_id)


def record(
    target: Target, drafter: Drafter, prompts: Sequence[tuple[str, Sequence[int]]], params: SamplingParams
) -> list[Text]:
    """Answer (domain, token ids), drafting at every token and verifying nothing. Prompt i has seed params.seed + i."""
    recorder, texts = Recorder(drafter), []
    engine = Engine(target, recorder, "fixed:0", max_num_seqs=32)
    seed = params.seed or 0
    requests = [engine.submit(list(ids), seeded(params, seed + i)) for i, (_, ids) in enumerate(prompts)]
    while engine.has_work:
        engine.step()
    for (domain, ids), request in zip(prompts, requests, strict=True):
        text, confidence, accepted = request.generated, [], []
        for anchor in range(len(text) - 1):
            # Of the last token before the limit no draft is asked for, and none is ever verified.
            draft, own = recorder.drafts.get((request.id, anchor + 1), ([], [0.5] * drafter.length))
            confidence.append(own)
            accepted.append(num_common(draft, text[anchor + 1 :]))
        if confidence:
            texts.append(Text(domain, len(ids), confidence, accepted, request.finish_reason == "stop"))
    return texts


def seeded(params: SamplingParams, seed: int) -> SamplingParams:
    return SamplingParams(temperature=params.temperature, max_tokens=params.max_tokens, seed=seed)


def num_common(draft: Sequence[int], text: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((k for k, (a, b) in enumerate(zip(draft, text, strict=False)) if a != b), min(len(draft), len(text)))


def rounds_of(texts: Sequence[Text]) -> Outcomes:
    """What verifying everything would show: the rounds that calibration is fitted to (dspark calibrate)."""
    confidence, accepted, known, owners = [], [], [], []
    for owner, text in enumerate(texts):
        anchor, length = 0, len(text.confidence[0])
        while anchor < len(text.accepted):
            left = len(text.accepted) - anchor
            if text.has_ended or left > length:
                confidence.append(text.confidence[anchor])
                accepted.append(text.accepted[anchor])
                known.append(left if text.has_ended else length)
                owners.append(owner)
            anchor += text.accepted[anchor] + 1
    places = torch.arange(len(confidence[0]))
    judged = torch.tensor(accepted)[:, None]
    return Outcomes(
        torch.tensor(confidence),
        places <= judged,
        places < judged,
        places < torch.tensor(known)[:, None],
        torch.tensor(owners),
        tuple(text.domain for text in texts),
    )


def save(path: Path, texts: Sequence[Text]) -> None:
    path.write_text("".join(json.dumps(vars(text)) + "\n" for text in texts), encoding="utf-8")


def load(path: Path) -> list[Text]:
    return [Text(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
