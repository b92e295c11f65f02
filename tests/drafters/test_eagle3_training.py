"""EAGLE-3 learns what it is shown, and then drafts it through the engine without changing a token."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import Tensor

from dspark.drafters.block_model import TraceBatch
from dspark.drafters.eagle3 import Eagle3Drafter
from dspark.drafters.eagle3_model import Eagle3Config, Eagle3Model
from dspark.engine.engine import Engine
from dspark.errors import CheckpointError, InvalidConfiguration
from dspark.losses import LossWeights, l1_and_cross_entropy, position_weights
from dspark.target.target import Target
from dspark.types import Generation, SamplingParams
from engine.models import VOCAB_SIZE, random_target, reference_features

LAYERS, HIDDEN, NUM_PROMPT, NUM_TOKENS = (0, 1), 32, 4, 24
CONFIG = Eagle3Config(
    hidden_size=HIDDEN,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=VOCAB_SIZE,
    target_layer_ids=LAYERS,
    num_target_layers=3,
    ttt_length=4,
)
REDUCED = dataclasses.replace(CONFIG, draft_vocab_size=30)
WEIGHTS = LossWeights(confidence=0.0)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return random_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(NUM_PROMPT)] for _ in range(4)]


@pytest.fixture(scope="module")
def batch(target: Target, prompts: list[list[int]]) -> TraceBatch:
    """What the target says to the prompts at temperature 0, with every place where drafting can start as an anchor."""
    texts = plain(target, prompts, SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS))
    token_ids = torch.tensor([g.prompt_token_ids + g.token_ids for g in texts])
    # What transformers calls the last hidden state is the normed one, which the LM head reads.
    states = torch.stack([reference_features(target, ids, (*LAYERS, 2)) for ids in token_ids.tolist()])
    anchors = torch.arange(NUM_PROMPT, token_ids.shape[1] - 1).expand(len(token_ids), -1)
    return TraceBatch(
        token_ids,
        (torch.arange(token_ids.shape[1]) >= NUM_PROMPT).expand(len(token_ids), -1),
        states[..., : 2 * HIDDEN],
        states[..., 2 * HIDDEN :],
        anchors,
        torch.ones_like(anchors).bool(),
    )


@pytest.fixture(scope="module", params=[CONFIG, REDUCED], ids=["full", "reduced"])
def trained(request: pytest.FixtureRequest, target: Target, batch: TraceBatch) -> tuple[Eagle3Model, float]:
    """A drafter that was shown the texts many times, and the tau that training reported."""
    torch.manual_seed(0)
    model = Eagle3Model(request.param)
    if request.param.draft_vocab_size:
        model.choose_vocabulary(frequent(batch, request.param.draft_vocab_size))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(70):
        losses = model.loss(batch, target.model.get_input_embeddings(), target.model.get_output_embeddings(), WEIGHTS)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    return model.requires_grad_(False), float(losses.tau)


def frequent(batch: TraceBatch, size: int) -> Tensor:
    """The likeliest tokens but one: so that the text also says what cannot be drafted."""
    counts = torch.bincount(batch.token_ids[:, NUM_PROMPT:].flatten(), minlength=VOCAB_SIZE)
    return counts.topk(size + 1).indices[1:]


def plain(target: Target, prompts: list[list[int]], params: SamplingParams) -> list[Generation]:
    return [Engine(target).generate([p], dataclasses.replace(params, seed=i))[0] for i, p in enumerate(prompts)]


def drafter(model: Eagle3Model, target: Target) -> Eagle3Drafter:
    head = target.model.get_output_embeddings()
    if model.target_ids is not None:
        weight = head.weight[model.target_ids].detach()
        head = torch.nn.Linear(HIDDEN, len(weight), bias=False).requires_grad_(False)
        head.weight.copy_(weight)
    return Eagle3Drafter(model, target.model.get_input_embeddings(), head)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("num_seqs", [1, 3])
def test_the_text_is_that_of_plain_decoding(
    target: Target, prompts: list[list[int]], trained: tuple[Eagle3Model, float], temperature: float, num_seqs: int
) -> None:
    """With fewer places than prompts, requests join when others leave; they differ in length."""
    params = [SamplingParams(temperature=temperature, max_tokens=NUM_TOKENS - 4 * i, seed=i) for i in range(4)]
    engine = Engine(target, drafter(trained[0], target), "fixed:7", max_num_seqs=num_seqs)
    free = target.num_free_slots
    texts = engine.generate(prompts, params)
    for text, expected, own in zip(texts, plain(target, prompts, params[0]), params, strict=True):
        assert text.token_ids == expected.token_ids[: own.max_tokens]
    assert target.num_free_slots == free
    assert engine.drafter.rows.num_rows == 0
    if temperature == 0:  # it was shown these very texts
        assert sum(g.tau for g in texts) / len(texts) > (3.0 if trained[0].target_ids is None else 1.8)


def test_training_knows_the_tau_of_decoding(
    target: Target, prompts: list[list[int]], trained: tuple[Eagle3Model, float]
) -> None:
    model, tau = trained
    texts = Engine(target, drafter(model, target), "fixed:7").generate(
        prompts, SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)
    )
    if model.target_ids is None:
        assert tau == pytest.approx(sum(g.tau for g in texts) / len(texts), rel=0.3)
        assert tau > 3
    accepted = [t for g in texts for t, is_drafted in zip(g.token_ids, g.is_drafted, strict=True) if is_drafted]
    if model.target_ids is not None:
        assert set(accepted) <= set(model.target_ids.tolist())
    assert accepted


@pytest.mark.parametrize("config", [CONFIG, REDUCED], ids=["full", "reduced"])
def test_the_loss_is_the_weighted_mean_over_what_can_be_learned(
    config: Eagle3Config, target: Target, batch: TraceBatch
) -> None:
    """Against the plain form over rows that are picked out one by one."""
    torch.manual_seed(0)
    model = Eagle3Model(config)
    known = set(range(VOCAB_SIZE))
    if config.draft_vocab_size:
        model.choose_vocabulary(frequent(batch, config.draft_vocab_size))
        known = set(model.target_ids.tolist())  # type: ignore[union-attr]
    embed, lm_head = target.model.get_input_embeddings(), target.model.get_output_embeddings()
    losses = model.loss(batch, embed, lm_head, WEIGHTS)
    hidden, total, weight = model.teacher_forced_hidden(batch, embed), torch.zeros(()), 0.0
    decay = position_weights(torch.ones(config.ttt_length), WEIGHTS.decay)
    for row, ids in enumerate(batch.token_ids.tolist()):
        for place, anchor in enumerate(batch.anchors[row].tolist()):
            for k in range(config.ttt_length):
                if anchor + k + 1 >= len(ids) or ids[anchor + k + 1] not in known:
                    break  # one position that cannot be learned from takes the rest with it
                logits = lm_head(hidden[row, place, k])
                logits[[t for t in range(VOCAB_SIZE) if t not in known]] = float("-inf")
                teacher = lm_head(batch.last_hidden[row, anchor + k]).softmax(-1)
                l1, ce = l1_and_cross_entropy(logits[None], teacher[None], torch.tensor([ids[anchor + k + 1]]))
                total = total + decay[k] * (WEIGHTS.cross_entropy * ce[0] + WEIGHTS.total_variation * l1[0])
                weight += float(decay[k])
    torch.testing.assert_close(losses.total, total / weight, atol=1e-4, rtol=1e-4)


def test_later_text_does_not_leak_into_a_chain(target: Target, batch: TraceBatch) -> None:
    model, embed = Eagle3Model(CONFIG), target.model.get_input_embeddings()
    before = model.teacher_forced_hidden(batch, embed)
    place, anchor = 5, int(batch.anchors[0, 5])
    changed = dataclasses.replace(
        batch, features=batch.features.clone(), token_ids=batch.token_ids.clone(), last_hidden=batch.last_hidden + 1
    )
    changed.features[:, anchor:] += 1  # of the anchor and what follows: not there yet when drafting starts
    changed.token_ids[:, anchor + 2 :] = 0
    after = model.teacher_forced_hidden(changed, embed)
    assert torch.equal(before[:, : place + 1, :2], after[:, : place + 1, :2])
    assert not torch.allclose(before[:, place, 2], after[:, place, 2])


def test_drafting_steps_see_their_own_outputs(target: Target, batch: TraceBatch) -> None:
    """The gradient of the second step's loss goes through the first step: that is what training-time test is for."""
    model, embed = Eagle3Model(CONFIG), target.model.get_input_embeddings()
    embedded: list[Tensor] = []

    def watched(ids: Tensor) -> Tensor:
        embedded.append(embed(ids).detach().requires_grad_())
        return embedded[-1]

    hidden = model.teacher_forced_hidden(batch, watched)  # type: ignore[arg-type]
    hidden[:, :, 3].square().mean().backward()
    first_step = embedded[1]  # [0] is the context's
    assert first_step.grad is not None and float(first_step.grad.abs().max()) > 0


def test_what_cannot_be_trained_or_built_is_refused(target: Target, batch: TraceBatch) -> None:
    own_head = Eagle3Model(dataclasses.replace(CONFIG, trains_lm_head=True))
    embed, lm_head = target.model.get_input_embeddings(), target.model.get_output_embeddings()
    with pytest.raises(InvalidConfiguration, match="LM head of its own"):
        own_head.loss(batch, embed, lm_head, WEIGHTS)
    with pytest.raises(InvalidConfiguration, match="expected 30 different token ids"):
        Eagle3Model(REDUCED).choose_vocabulary(torch.tensor([1, 2, 2]))
    for change, message in [
        ({"num_hidden_layers": 2}, "one layer"),
        ({"model_type": "gemma4"}, "qwen3 or llama"),
        ({"ttt_length": 0}, "ttt_length must be"),
        ({"draft_vocab_size": 99}, "draft_vocab_size must be"),
        ({"target_layer_ids": (2, 1)}, "strictly increasing"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            dataclasses.replace(CONFIG, **change)
