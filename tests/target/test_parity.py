"""Law: however requests are cut into spans and mixed, every row of logits is the one the plain model gives alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dspark.types import Span

Pair = Any  # conftest.Pair: a target and the same weights as a plain transformers model
VOCAB = 97
TOLERANCE = 2e-5


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def read(pair: Pair, request: int, tokens: list[int], **span: object) -> torch.Tensor:
    """[n, V]  logits of all the tokens, appended to the request."""
    span.setdefault("num_logits", len(tokens))
    return pair.target.extend([Span(request, pair.target.cache.length(request), tokens, **span)]).logits


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def shuffle_slots(pair: Pair) -> None:
    """Use and free many slots out of order, then fill them with NaN."""
    rng = random.Random(0)
    for request in range(900, 930):
        read(pair, request, random_tokens(5, request), num_logits=0)
    for request in rng.sample(range(900, 930), 30):
        pair.target.release(request)
    pair.poison_unused_slots()


def test_history_matters(pair: Pair) -> None:
    """Without this, every other test here would pass with a cache that forgets."""
    reach = 8 if pair.target.name == "mistral" else 20  # its windows of 7 forget the rest
    tokens = random_tokens(21)
    changed = list(tokens)
    changed[-reach] = (changed[-reach] + 7) % VOCAB
    last, other = pair.logits(tokens)[-1], pair.logits(changed)[-1]
    assert (last - other).std() > 0.1 * last.std()


def test_interleaved_chunks_and_decoding(pair: Pair) -> None:
    shuffle_slots(pair)
    texts = {request: random_tokens(length, request) for request, length in enumerate((31, 23, 40, 9))}
    expected = {request: pair.logits(text) for request, text in texts.items()}
    cuts = {0: (20, 1, 1, 9), 1: (3, 18, 1, 1), 2: (17, 17, 5, 1), 3: (1, 1, 1, 6)}
    for step in range(4):
        spans, rows = [], []
        for request, sizes in cuts.items():
            start = sum(sizes[:step])
            end = start + sizes[step]
            num_logits = min(sizes[step], 1 + (request + step) % 4)
            spans.append(Span(request, start, texts[request][start:end], num_logits=num_logits))
            rows.append(expected[request][end - num_logits : end])
        close(pair.target.extend(spans).logits, torch.cat(rows))
        pair.poison_unused_slots()


def test_rejected_drafts_leave_nothing_behind(pair: Pair) -> None:
    shuffle_slots(pair)
    text = random_tokens(30)
    expected = pair.logits(text)
    read(pair, 0, text[:10])
    read(pair, 1, random_tokens(6, 5))
    at = 10
    for num_right in (3, 0, 2, 5):
        draft = text[at : at + 1 + num_right] + random_tokens(5 - num_right, at)
        spans = [Span(1, 6, random_tokens(3, 9)), Span(0, at, draft, num_logits=6)]
        close(pair.target.extend(spans).logits[: num_right + 1], expected[at : at + num_right + 1])
        pair.target.keep(0, at, range(num_right + 1))
        pair.target.keep(1, 6, ())
        pair.poison_unused_slots()
        at += num_right + 1
    close(read(pair, 0, text[at:]), expected[at:])


def test_every_tree_path_reads_as_if_alone(pair: Pair) -> None:
    shuffle_slots(pair)
    prefix, nodes = random_tokens(12), random_tokens(9, 3)
    parents = [-1, 0, 0, 1, 1, 2, 5, 3, 6]
    read(pair, 7, prefix)
    read(pair, 8, prefix[:5])
    spans = [Span(8, 5, prefix[5:6], num_logits=1), Span(7, 12, nodes, parents=parents, num_logits=9)]
    logits = pair.target.extend(spans).logits
    close(logits[:1], pair.logits(prefix[:6])[-1:])
    paths = []
    for node in range(9):
        path = [node]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        paths.append(path)
        close(logits[1 + node], pair.logits(prefix + [nodes[i] for i in path])[-1])
    chosen = paths[8]
    pair.target.keep(7, 12, chosen)
    pair.poison_unused_slots()
    whole = prefix + [nodes[i] for i in chosen] + random_tokens(8, 11)
    close(read(pair, 7, whole[12 + len(chosen) :]), pair.logits(whole)[12 + len(chosen) :])


def test_a_wide_tree_alone(pair: Pair) -> None:
    """More nodes than a short span has: attended on its own, not in the padded batch."""
    prefix, nodes = random_tokens(9), random_tokens(24, 4)
    parents = [-1, *[(i - 1) // 2 for i in range(1, 24)]]
    read(pair, 1, prefix)
    logits = read(pair, 1, nodes, parents=parents)
    for leaf in (23, 15, 18):
        path = [leaf]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        close(logits[path], pair.logits(prefix + [nodes[i] for i in path])[9:])


def test_features_are_the_raw_outputs_of_the_layers(pair: Pair) -> None:
    text = random_tokens(25)
    expected = pair.hidden_states(text)
    layers = (2, -1, 0)
    pair.target.extend([Span(0, 0, text[:19]), Span(1, 0, text[:4])])
    features = pair.target.extend([Span(1, 4, text[4:6]), Span(0, 19, text[19:])], layers).features
    assert features is not None
    wanted = torch.cat([expected[layer + 1] for layer in layers], -1)
    torch.testing.assert_close(features, torch.cat([wanted[4:6], wanted[19:]]), atol=1e-4, rtol=1e-5)


def test_the_last_layers_feature_comes_before_the_final_norm(pair_of: Callable[[str], Pair]) -> None:
    pair = pair_of("qwen3")
    text = random_tokens(6)
    raw = pair.target.extend([Span(0, 0, text)], (3,)).features
    pair.target.release(0)
    normed = pair.plain.model(input_ids=torch.tensor([text])).last_hidden_state[0]
    torch.testing.assert_close(pair.plain.model.norm(raw), normed, atol=1e-5, rtol=1e-5)


def test_truncated_target_shares_weights_and_slots(pair: Pair) -> None:
    text, draft = random_tokens(14), random_tokens(3, 2)
    expected = pair.logits(text)
    short = pair.target.truncated(2)
    assert short.cache is pair.target.cache
    assert short.num_layers == 2
    read(pair, 0, text[:10])
    state = pair.hidden_states(text[:10] + draft)[2]
    span = Span(0, 10, draft, num_logits=3)
    extension = short.extend([span], (1,))
    torch.testing.assert_close(extension.features, state[10:], atol=1e-4, rtol=1e-5)
    assert extension.logits.shape == (3, VOCAB)
    short.keep(0, 10, ())
    close(read(pair, 0, text[10:]), expected[10:])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_a_block_sees_itself_whole(pair_of: Callable[[str], Pair], family: str) -> None:
    """Every token of a block depends on every other, and the block on its prefix; what follows does not notice."""
    pair = pair_of(family)
    prefix, block = random_tokens(6), random_tokens(4, 1)
    read(pair, 0, prefix)
    base = pair.target.extend([Span(0, 6, block, num_logits=4, is_block=True)]).logits
    pair.target.keep(0, 6, ())
    for changed in range(4):
        other = list(block)
        other[changed] = (other[changed] + 5) % VOCAB
        spans = [Span(1, 0, prefix[:3]), Span(0, 6, other, num_logits=4, is_block=True)]
        moved = (pair.target.extend(spans).logits - base).abs().amax(-1)
        pair.target.keep(0, 6, ())
        pair.target.release(1)
        assert (moved > 1e-4).all()
    close(read(pair, 0, block), pair.logits(prefix + block)[6:])


def test_no_logits_wanted(pair: Pair) -> None:
    extension = pair.target.extend([Span(0, 0, random_tokens(5))])
    assert extension.logits.shape == (0, VOCAB)
    assert extension.features is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(make_pair: Callable[..., Pair], dtype: torch.dtype) -> None:
    pair = make_pair("qwen3")
    pair.target.model.to(dtype)
    text = random_tokens(20)
    found = torch.cat([read(pair, 0, text[:12]), read(pair, 0, text[12:])]).float()
    expected = pair.logits(text)
    assert (found - expected).abs().mean() < 0.05 * expected.std()


def test_random_traffic(pair: Pair) -> None:
    """Requests join, read, guess, roll back and leave at random; every committed row equals the plain model's."""
    rng = random.Random(pair.target.name)
    texts: dict[int, list[int]] = {}
    for step in range(40):
        if len(texts) < 5:
            texts[step] = random_tokens(60, step)
        spans = []
        for request, text in texts.items():
            start = pair.target.cache.length(request)
            size = rng.choice((1, 1, 4, 7, 18))
            if rng.random() < 0.7:
                tokens = text[start : start + size]
                spans.append(Span(request, start, tokens, num_logits=len(tokens)))
        spans = [span for span in spans if len(span.tokens)]
        rng.shuffle(spans)
        if spans:
            pieces = pair.target.extend(spans).logits.split([span.num_logits for span in spans])
            for span, piece in zip(spans, pieces, strict=True):
                kept = rng.randint(1, len(span.tokens))
                end = span.start + len(span.tokens)
                close(piece, pair.logits(texts[span.request_id][:end])[span.start :])
                pair.target.keep(span.request_id, span.start, range(kept))
        for request in list(texts):
            if pair.target.cache.length(request) >= 50 or rng.random() < 0.05:
                pair.target.release(request)
                del texts[request]
        pair.target.cache.check()
        if pair.target.cache.storage:
            pair.poison_unused_slots()
