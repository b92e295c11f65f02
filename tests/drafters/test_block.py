"""The runtime drafter against DeepSpec's formulas in plain loops, made anew for every step and without a cache."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from drafters.formulas import BLOCK, CONFIG, DFLASH, HIDDEN, VOCAB, Pair, assert_as_expected, naive_block
from dspark.drafters.block_model import TraceBatch
from dspark.errors import InvalidConfiguration
from dspark.types import FeaturePiece, Request, SamplingParams
from dspark.verify import Rejection


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ragged_batch_equals_the_formulas(temperature: float) -> None:
    pair = Pair()
    requests = [pair.request(id, n, temperature=temperature) for id, n in enumerate([9, 2, 23])]
    assert_as_expected(pair, requests, pair.propose(requests))


def test_history_matters() -> None:
    """The pair under test would hide a wrong cache if its drafts did not depend on the context."""
    pair = Pair()
    request = pair.request(0, 12)
    _, confidence = pair.expected(request)
    pair.all_features[0][3] += 1
    assert max(abs(a - b) for a, b in zip(confidence, pair.expected(request)[1], strict=True)) > 1e-4


def test_partial_acceptance_join_and_leave() -> None:
    pair = Pair()
    a, b, c, d = (pair.request(id, n) for id, n in enumerate([9, 4, 13, 6]))
    assert_as_expected(pair, [a, b], pair.propose([a, b]))
    pair.commit(a, [7, 8, 9])
    pair.commit(b, [5])
    assert_as_expected(pair, [b, c, a], pair.propose([b, c, a]))
    pair.drafter.release(a.id)
    for r in (b, c):
        pair.commit(r, [11] * 6)
    assert_as_expected(pair, [c, d, b], pair.propose([c, d, b]))
    pair.commit(d, [3, 4])
    assert_as_expected(pair, [d], pair.propose([d]))  # the others were not asked, and are still known
    pair.commit(c, [3, 4])
    assert_as_expected(pair, [d, c], pair.propose([d, c]))


def test_not_asked_for_some_steps() -> None:
    pair = Pair()
    a, b = pair.request(0, 9), pair.request(1, 5)
    pair.propose([a, b])
    pair.commit(a, [7, 8])
    pair.commit(b, [7])
    pair.propose([b])
    pair.commit(a, [9, 10, 11], asked=False)
    assert_as_expected(pair, [a], pair.propose([a]))


@pytest.mark.parametrize("window", [None, 4])
def test_features_can_come_in_pieces_among_those_of_others(window: int | None) -> None:
    """In a run, in rows of their own, after some that were joined, and with some that were read before."""
    pair = Pair(window=window)
    request = pair.request(0, 6)
    pair.propose([request])
    for tokens, joined in (([7, 8, 9], 0), ([5], 0), ([7, 8, 9, 5, 6, 7], 2), ([5, 6, 7, 8], 4)):
        pair.commit(request, tokens)
        start, features = request.features_start, pair.all_features[0]
        request.features = features[start : start + joined] if joined else None
        start += joined
        count = request.num_cached - start
        request.feature_pieces = [FeaturePiece(features, start, 1)] if count else []
        if count > 1:
            others, rows = features[start + 1 : start + count].flip(0), list(range(count - 1))[::-1]
            request.feature_pieces.append(FeaturePiece(others, 0, count - 1, rows))
        assert_as_expected(pair, [request], pair.propose([request]), window)
        request.feature_pieces = []
    pair.commit(request, [7, 8], asked=False)  # reads once more what it knows
    features, request.features = request.features, None
    request.feature_pieces = [FeaturePiece(features, 0, 1), FeaturePiece(features, 1, len(features) - 1)]
    assert_as_expected(pair, [request], pair.propose([request]), window)


def test_release_starts_over() -> None:
    pair = Pair()
    request = pair.request(0, 9)
    pair.propose([request])
    pair.commit(request, [7, 8, 9])
    pair.drafter.release(0)
    pair.drafter.release(0)
    request.features_start, request.features = 0, pair.all_features[0][: request.num_cached]
    assert_as_expected(pair, [request], pair.propose([request]))


def test_features_must_meet_what_was_read() -> None:
    pair = Pair()
    request = pair.request(0, 9)
    request.features_start, request.features = 2, request.features[2:]
    with pytest.raises(AssertionError, match=r"features of 0..7 are needed, range\(2, 8\) are there"):
        pair.propose([request])


def test_the_first_token_of_all_can_be_an_anchor() -> None:
    """A prompt of one token has no context at all."""
    pair = Pair()
    requests = [pair.request(0, 1), pair.request(1, 4)]
    assert_as_expected(pair, requests, pair.propose(requests))
    assert_as_expected(pair, requests[:1], pair.propose(requests[:1]))


@pytest.mark.parametrize("window", [3, 8, 300])
def test_window_keeps_the_newest_positions(window: int) -> None:
    pair = Pair(window=window)
    requests = [pair.request(id, n) for id, n in enumerate([9, 2, 23])]
    for step in range(5):
        assert_as_expected(pair, requests, pair.propose(requests), window)
        for request in requests:
            pair.commit(request, [4 + step] * (1 + (request.id + step) % 5))
    assert pair.drafter.rows.keys[0].shape[1] <= BLOCK + window


def test_batch_equals_singles() -> None:
    together, alone = Pair(), Pair()
    sizes = [3, 17, 9, 1, 30, 12, 12, 5]
    draft = together.propose([together.request(id, n) for id, n in enumerate(sizes)])
    assert draft.confidence is not None
    for id, n in enumerate(sizes):
        single = alone.propose([alone.request(id, n)])
        assert single.tokens[0].tolist() == draft.tokens[id].tolist()
        torch.testing.assert_close(single.confidence[0], draft.confidence[id])


def test_no_row_is_leaked() -> None:
    pair = Pair()
    requests = [pair.request(id, 5) for id in range(6)]
    for request in requests:
        pair.propose([request])
    assert pair.drafter.rows.num_rows == 6
    for id in (0, 5, 2, 3, 1, 4, 77):
        pair.drafter.release(id)
    assert pair.drafter.rows.num_rows == 0
    pair.propose([pair.request(8, 5)])
    assert len(pair.drafter.rows.keys[0]) <= 8


class Scripted:
    """Draws what it was told, and keeps the logits it was shown."""

    allows_anticipation = True

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.logits: list[Tensor] = []

    def draft(self, logits: Tensor, requests: list[Request], previous: list[list[int]]) -> tuple[Tensor, None]:
        self.logits.append(logits[0])
        return torch.tensor([self.tokens[len(p)] for p in previous]), None

    def noise_ahead(self, requests: list[Request], length: int) -> None:
        return None


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_confidence_does_not_anticipate(kind: str) -> None:
    pair = Pair(dataclasses.replace(CONFIG, markov_head_type=kind))
    tokens = [5, 6, 7, 8, 9]
    before = pair.propose([pair.request(0, 9)], Scripted(tokens)).confidence
    for k in range(BLOCK):
        pair.drafter.release(0)
        after = pair.propose([pair.request(0, 9)], Scripted([*tokens[:k], 20, *tokens[k + 1 :]])).confidence
        changed = (after != before)[0].tolist()
        assert not any(changed[: k + 1]), "known before token k was drawn"
        assert changed[k + 1 : k + 2] == [True][: BLOCK - k - 1], "and it does look at the token before"


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_drawing_ahead_equals_drawing_by_the_rule(kind: str, temperature: float) -> None:
    pair = Pair(dataclasses.replace(CONFIG, markov_head_type=kind))
    requests = [pair.request(id, n, temperature=temperature) for id, n in enumerate([9, 2, 23])]
    ahead = pair.propose(requests)
    # A bias of nothing leaves the law alone, and the rule must be asked for it all the same.
    asked = dataclasses.replace(requests[0].params, logit_bias={0: 0.0})
    by_rule = pair.propose([dataclasses.replace(r, params=asked) for r in requests])
    assert ahead.tokens.tolist() == by_rule.tokens.tolist()
    torch.testing.assert_close(ahead.confidence, by_rule.confidence)


def test_rejection_rule_gets_the_laws() -> None:
    pair = Pair()
    requests = [pair.request(id, n, temperature=0.8, top_k=9) for id, n in enumerate([9, 2])]
    draft = pair.propose(requests[::-1], Rejection(pair.draws))
    assert draft.probs is not None and draft.probs.shape == (2, BLOCK, VOCAB)
    torch.testing.assert_close(draft.probs.sum(-1), torch.ones(2, BLOCK), check_dtype=False)
    assert (draft.probs.gather(-1, draft.tokens[..., None]) > 0).all()
    again = pair.propose(requests, Rejection(pair.draws))
    torch.testing.assert_close(again.probs, draft.probs.flip(0))


def test_dflash_has_no_confidence() -> None:
    pair = Pair(DFLASH)
    request = pair.request(0, 9, temperature=0.0)
    draft = pair.propose([request])
    hidden = naive_block(
        pair.model.state_dict(), DFLASH, pair.embed, request.tokens[-1], pair.all_features[0][:8], None
    )
    assert draft.confidence is None
    assert draft.tokens[0].tolist() == (hidden @ pair.lm_head.weight.T).argmax(-1).tolist()


def test_shorter_drafts_are_prefixes() -> None:
    whole, short = Pair(), Pair(length=2)
    a, b = whole.propose([whole.request(0, 9)]), short.propose([short.request(0, 9)])
    assert b.sizes.tolist() == [2] and b.tokens.tolist() == a.tokens[:, :2].tolist()
    torch.testing.assert_close(b.confidence, a.confidence[:, :2])


@pytest.mark.parametrize("option", [{"length": 0}, {"length": BLOCK + 1}, {"window": 0}])
def test_senseless_options(option: dict[str, int]) -> None:
    with pytest.raises(InvalidConfiguration, match=f"{next(iter(option))} must be"):
        Pair(**option)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_training_logits_equal_runtime_logits(kind: str) -> None:
    pair = Pair(dataclasses.replace(CONFIG, markov_head_type=kind))
    text = pair.request(0, 30)
    features = torch.cat([text.features, torch.zeros(1, 2 * HIDDEN)])[None]
    anchors = torch.tensor([[4, 11, 20]])
    batch = TraceBatch(
        torch.tensor([text.tokens]), torch.ones(1, 30), features, torch.zeros(1, 30, HIDDEN), anchors, anchors > 0
    )
    hidden = pair.model.teacher_forced_hidden(batch, pair.embed)[0]
    for anchor, trained in zip(anchors[0].tolist(), hidden, strict=True):
        teacher = Scripted(text.tokens[anchor + 1 :])
        known = text.features[:anchor]
        request = Request(anchor, text.tokens[: anchor + 1], SamplingParams(), 1, num_cached=anchor, features=known)
        draft = pair.drafter.propose([request], teacher)
        previous = torch.tensor([text.tokens[anchor : anchor + BLOCK]])
        bias, e = pair.model.head.teacher_forced(previous, trained[None])
        expected = (pair.lm_head(trained) + bias[0]).float()
        torch.testing.assert_close(torch.stack(teacher.logits), expected, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(draft.confidence[0], pair.model.confidence(trained, e[0]).sigmoid().float())
