"""Whatever befalls a request, its drafter knows what one knows that reads the whole text at once.

Wrong features or a stale cache change no text, only how often drafts are right, so nothing else would tell.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import nn

from dspark.drafters.block import BlockDrafter
from dspark.drafters.block_model import BlockConfig, BlockModel
from dspark.drafters.draft_model import DraftModelDrafter, SelfDrafter
from dspark.drafters.eagle3 import Eagle3Drafter
from dspark.drafters.eagle3_model import Eagle3Config, Eagle3Model
from dspark.drafters.tree import TreeDrafter
from dspark.engine import drafting
from dspark.engine.engine import Engine
from dspark.target.loading import load_target
from dspark.types import Drafter, Request, SamplingParams
from engine.models import VOCAB_SIZE, Known, OracleDrafter, random_target, reference_features
from engine.spies import Fickle, Spy, Whole, interrupt

LAYERS = (0, 1)
NUM_TEXTS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("target")


@pytest.fixture(scope="module")
def target(folder):
    return random_target(folder, context=160)


@pytest.fixture(scope="module")
def prompts():
    """They begin alike, some go on from one another, and some are longer than a step reads."""
    rng = random.Random(0)
    system = [rng.randrange(VOCAB_SIZE) for _ in range(37)]
    lengths = (0, 2, 11, 12, 40, 5, 27)
    prompts = [system + [rng.randrange(VOCAB_SIZE) for _ in range(n)] for n in lengths]
    return [*prompts, system[:17], [7], [rng.randrange(VOCAB_SIZE) for _ in range(50)]]


@pytest.fixture(scope="module")
def params():
    return [SamplingParams(temperature=[1.0, 0.0, 0.7][i % 3], seed=i, max_tokens=36) for i in range(NUM_TEXTS)]


@pytest.fixture(scope="module")
def texts(target, prompts, params):
    longer = [SamplingParams(temperature=p.temperature, seed=p.seed, max_tokens=50) for p in params]
    return [g.prompt_token_ids + g.token_ids for g in Engine(target).generate(prompts, longer)]


def test_what_lies_far_back_matters(target, texts):
    """Else wrong features would look like right ones."""
    text = max(texts, key=len)
    other = [(text[0] + 1) % VOCAB_SIZE, *text[1:]]
    here, there = (reference_features(target, t, LAYERS)[-30:] for t in (text, other))
    assert ((here - there).abs().amax(1) > 0.05).float().mean() > 0.9


def spread(model: nn.Module) -> nn.Module:
    """Weights so large that attention picks: a mean over the context would hardly notice a position."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.35)
    return model.eval()


SHAPE = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def block(target, window: int | None = None, head: str = "vanilla") -> Callable[[], Drafter]:
    config = BlockConfig(
        **SHAPE,
        num_hidden_layers=2,
        vocab_size=VOCAB_SIZE,
        target_layer_ids=LAYERS,
        block_size=3,
        mask_token_id=3,
        num_target_layers=3,
        markov_rank=4,
        markov_head_type=head,
    )
    model, ends = (
        spread(BlockModel(config)),
        (target.model.get_input_embeddings(), target.model.get_output_embeddings()),
    )
    return lambda: BlockDrafter(model, *ends, window=window)


def eagle3(target, window: int | None = None, num_scratch: int | None = None) -> Callable[[], Drafter]:
    config = Eagle3Config(
        **SHAPE, vocab_size=VOCAB_SIZE, target_layer_ids=LAYERS, num_target_layers=3, ttt_length=3, model_type="qwen3"
    )
    model, ends = (
        spread(Eagle3Model(config)),
        (target.model.get_input_embeddings(), target.model.get_output_embeddings()),
    )
    return lambda: Eagle3Drafter(model, *ends, window=window, num_scratch=num_scratch)


def spy_on(kind: str, target, folder, texts) -> Spy:
    guesses = OracleDrafter(texts, length=5, tree="tree" in kind)
    if kind in ("draft_model", "self"):
        whole = Whole(target, texts, ())
        if kind == "self":
            return Spy(SelfDrafter(target, 3, 3), guesses, whole, check=says_what(whole))
        return Spy(DraftModelDrafter(load_target(str(folder), device="cpu"), 3), guesses, whole, check=says_what(whole))
    make = {
        "block": lambda: block(target),
        "block, window": lambda: block(target, window=9, head="rnn"),
        "block, tree": lambda: block(target, window=40, head="gated"),
        "eagle3": lambda: eagle3(target),
        "eagle3, window, tree": lambda: eagle3(target, window=9, num_scratch=4),
    }[kind]()
    afresh = (lambda: TreeDrafter(make(), 6, 2)) if "tree" in kind else make
    return Spy(afresh(), guesses, Whole(target, texts, LAYERS), afresh)


def says_what(whole: Whole):
    """A drafter that is the target itself says what it says, at every step of its drafts that the text takes, too."""

    def check(request, path, logits):
        tokens = [*request.tokens, *path]
        known = [e for text, e in zip(whole.texts, whole.logits, strict=True) if text[: len(tokens)] == tokens]
        assert known or path, "a request whose text is none of these"
        if known:
            torch.testing.assert_close(logits, known[0][len(tokens) - 1], atol=5e-3, rtol=2e-3)

    return check


@pytest.mark.parametrize(
    ("kind", "prefix_tokens", "num_slots"),
    [
        ("block", 4096, 65536),
        ("block, window", 64, 140),
        ("block, tree", 0, 140),
        ("eagle3", 0, 140),
        ("eagle3, window, tree", 4096, 65536),
        ("draft_model", 64, 140),
        ("self", 64, 140),
    ],
)
def test_drafters_know_what_reading_it_all_tells(
    target, folder, prompts, params, texts, kind, prefix_tokens, num_slots, monkeypatch
):
    monkeypatch.setattr(drafting, "_MOST_UNREAD", 6)
    monkeypatch.setattr(drafting, "_MOST_HELD", 40)
    rng, records, limit = random.Random(kind), [], target.cache.limit
    target.resize(num_slots)
    spy = spy_on(kind, target, folder, texts)
    engine = Engine(
        target,
        spy,
        "fixed:10",
        max_num_seqs=5,
        max_num_batched_tokens=24,
        prefix_tokens=prefix_tokens,
        guard=Fickle(rng),
        capacity=Known(),
        observers=[records.append],
    )
    joining = [(i, fate) for i in range(NUM_TEXTS) for fate in ("ends", "stops", "leaves")]
    rng.shuffle(joining)
    requests: dict[Request, tuple[int, str]] = {}
    while joining or engine.has_work:
        if joining and rng.random() < 0.5:
            i, fate = joining.pop()
            stop = (texts[i][len(prompts[i]) + rng.randrange(2, 9)],) if fate == "stops" else ()
            own = SamplingParams(
                temperature=params[i].temperature, seed=i, max_tokens=params[i].max_tokens, stop_token_ids=stop
            )
            requests[engine.submit(prompts[i], own)] = i, fate
        event = rng.random()
        if event < 0.04:
            engine.set_aside()
        if event > 0.85 and engine.batcher.running:
            interrupt(engine, rng)
        else:
            engine.step()
        for request, (i, fate) in requests.items():
            if fate == "leaves" and len(request.generated) > 4:
                engine.cancel(request)
            assert request.tokens == texts[i][: len(request.tokens)]
    target.cache.check()
    assert target.num_free_slots == target.cache.limit and not spy.num_given
    target.resize(limit)
    assert {r.finish_reason for r in requests} == {"length", "stop", "cancelled"}
    assert spy.num_compared > 300 and spy.num_missed < 0.01 * spy.num_compared
    if spy.feature_layers:
        assert spy.num_checked > 500 and (spy.num_read > 0) == hasattr(spy, "read")
    if num_slots < limit:
        assert sum(r.num_preempted for r in records) > 0
    if prefix_tokens:
        assert sum(r.num_prefix_found for r in records) > 100
    assert any(request.is_drafted and request.rounds for request in requests)


def test_a_prompt_that_is_read_token_by_token_beside_others_is_told_whole(target, folder, prompts, params, texts):
    """Nothing is verified, so the others read one token, too; they are drafted for while the prompt is not."""
    spy = spy_on("block", target, folder, texts)
    engine = Engine(target, spy, "fixed:0", max_num_batched_tokens=1, capacity=Known())
    requests = []
    for i in range(2):
        requests.append(engine.submit(prompts[i], params[i]))
        while not requests[-1].generated:
            engine.step()
    while engine.has_work:
        engine.step()
    assert (
        all(r.tokens == text[: len(r.tokens)] for r, text in zip(requests, texts, strict=False)) and spy.num_checked > 0
    )
