"""The drafter's network: checkpoint names, no leaks, and training equal to inference."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RotaryEmbedding

from dspark.drafters.block_attention import BlockAttention, FlexBlockAttention
from dspark.drafters.block_model import BlockConfig, BlockModel, TraceBatch
from dspark.errors import CheckpointError
from dspark.losses import LossWeights

CONFIG = BlockConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=23,
    target_layer_ids=(0, 2),
    block_size=5,
    mask_token_id=3,
    num_target_layers=4,
    markov_rank=6,
    enable_confidence_head=True,
    confidence_head_with_markov=True,
)
DFLASH = dataclasses.replace(CONFIG, markov_rank=0, enable_confidence_head=False, confidence_head_with_markov=False)


def random_model(config: BlockConfig, seed: int = 0) -> BlockModel:
    torch.manual_seed(seed)
    model = BlockModel(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4 + (1.0 if parameter.ndim == 1 else 0.0))
    return model


def random_batch(config: BlockConfig, seed: int = 1, width: int = 13) -> tuple[TraceBatch, nn.Embedding, nn.Linear]:
    torch.manual_seed(seed)
    embed = nn.Embedding(config.vocab_size, config.hidden_size).double().requires_grad_(False)
    lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False).double().requires_grad_(False)
    mask = torch.ones(2, width, dtype=torch.bool)
    mask[:, :2] = False
    return (
        TraceBatch(
            token_ids=torch.randint(4, config.vocab_size, (2, width)),
            loss_mask=mask,
            features=torch.randn(2, width, len(config.target_layer_ids) * config.hidden_size).double(),
            last_hidden=torch.randn(2, width, config.hidden_size).double(),
            anchors=torch.tensor([[2, 4, 9], [3, 7, 10]]),
            kept=torch.ones(2, 3, dtype=torch.bool),
        ),
        embed,
        lm_head,
    )


def draft_hidden(model: BlockModel, features: Tensor, anchor: int, token: int, embed: nn.Embedding) -> Tensor:
    """One block the plain way: keys and values of the context before the anchor and of the block, in one piece, no mask."""
    positions = torch.arange(anchor)
    cached = model.context_keys_values(model.context(features[:anchor]), positions)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = torch.cat([cached[layer][0], k]), torch.cat([cached[layer][1], v])
        group = q.shape[1] // k.shape[1]
        out = []
        for head in range(q.shape[1]):
            scores = q[:, head] @ keys[:, head // group].T / q.shape[2] ** 0.5
            out.append(torch.softmax(scores, -1) @ values[:, head // group])
        return torch.stack(out, 1)

    ids = model.block_inputs(torch.tensor(token))
    return model.block(embed(ids), torch.arange(anchor, anchor + len(ids)), attend)


def test_names_are_the_released_ones() -> None:
    layer = [
        "input_layernorm",
        "post_attention_layernorm",
        *(f"self_attn.{x}" for x in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
        *(f"mlp.{x}" for x in ("gate_proj", "up_proj", "down_proj")),
    ]
    backbone = {"fc.weight", "hidden_norm.weight", "norm.weight"} | {
        f"layers.{i}.{name}.weight" for i in range(2) for name in layer
    }
    markov = {"markov_head.markov_w1.weight", "markov_head.markov_w2.weight"}
    confidence = {"confidence_head.proj.weight", "confidence_head.proj.bias"}
    assert set(BlockModel(DFLASH).state_dict()) == backbone
    assert set(BlockModel(CONFIG).state_dict()) == backbone | markov | confidence
    gated = BlockModel(dataclasses.replace(CONFIG, markov_head_type="gated")).state_dict()
    assert gated.keys() - backbone - markov - confidence == {
        "markov_head.gate_proj.weight",
        "markov_head.gate_proj.bias",
    }
    assert gated["markov_head.gate_proj.weight"].shape == (6, 16 + 6)
    rnn = BlockModel(dataclasses.replace(CONFIG, markov_head_type="rnn")).state_dict()
    assert rnn["markov_head.joint_proj.weight"].shape == (3 * 6, 2 * 6 + 16)
    assert gated["confidence_head.proj.weight"].shape == (1, 16 + 6)
    assert gated["markov_head.markov_w2.weight"].shape == (23, 6)


@pytest.mark.parametrize("config", [CONFIG, DFLASH])
def test_config_survives_a_round_trip(config: BlockConfig) -> None:
    written = config.to_dict()
    assert ("markov_head_type" in written) == (config.markov_rank > 0)
    assert BlockConfig.from_dict(written) == config


def test_config_of_older_and_stranger_files() -> None:
    written = CONFIG.to_dict()
    del written["rope_parameters"]
    assert BlockConfig.from_dict({**written, "rope_theta": 1e6}).rope_theta == 1e6
    gemma = {
        "rope_theta": None,
        "rope_type": "default",
        "full_attention": {"rope_theta": 1e6, "rope_type": "proportional"},
    }
    assert BlockConfig.from_dict({**written, "rope_parameters": gemma}).rope_theta == 1e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_layer_ids": [2, 1]}, "strictly increasing"),
        ({"target_layer_ids": [0, 3]}, "last layer"),
        ({"block_size": None}, "block_size"),
    ],
)
def test_wrong_configs_name_the_mistake(change: dict, message: str) -> None:
    config = {key: value for key, value in {**CONFIG.to_dict(), **change}.items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        BlockConfig.from_dict(config)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_steps_of_the_head_equal_the_teacher_forced_pass(kind: str) -> None:
    head = random_model(dataclasses.replace(CONFIG, markov_head_type=kind)).head
    previous, hidden = torch.randint(0, 23, (4, 5)), torch.randn(4, 5, 16).double()
    bias, e = head.teacher_forced(previous, hidden)
    assert bias is not None and e is not None
    state = head.initial_state(4)
    for k in range(5):
        bias_k, e_k, state = head.step(previous[:, k], hidden[:, k], state)
        assert torch.allclose(bias_k, bias[:, k]) and torch.equal(e_k, e[:, k])
    assert not torch.allclose(bias[:, 1], head.teacher_forced(previous.roll(1, 1), hidden)[0][:, 1])


def test_rnn_head_is_the_papers_recurrence() -> None:
    """Equation 6 with the released order: z = [s, e, h]; gate, candidate, output; the output sees the old state."""
    head = random_model(dataclasses.replace(CONFIG, markov_head_type="rnn")).head
    previous, hidden, state = torch.tensor([5]), torch.randn(1, 16).double(), torch.randn(1, 6).double()
    bias, e, new = head.step(previous, hidden, state)
    gate, candidate, output = (head.joint_proj(torch.cat([state, e, hidden], 1))).split(6, 1)
    assert torch.allclose(new, gate.sigmoid() * state + (1 - gate.sigmoid()) * candidate.tanh())
    assert torch.allclose(bias, output.tanh() @ head.markov_w2.weight.T)


def test_markov_head_without_weights_is_dflash() -> None:
    dspark, dflash = random_model(CONFIG), random_model(DFLASH)
    dflash.load_state_dict({name: tensor for name, tensor in dspark.state_dict().items() if "_head" not in name})
    batch, embed, lm_head = random_batch(CONFIG)
    weights = LossWeights(confidence=0.0)
    assert not torch.allclose(
        dspark.loss(batch, embed, lm_head, weights).total, dflash.loss(batch, embed, lm_head, weights).total
    )
    with torch.no_grad():
        dspark.head.markov_w1.weight.zero_()
    assert torch.equal(dspark.teacher_forced_hidden(batch, embed), dflash.teacher_forced_hidden(batch, embed))
    assert torch.equal(
        dspark.loss(batch, embed, lm_head, weights).total, dflash.loss(batch, embed, lm_head, weights).total
    )


def test_training_forward_equals_inference() -> None:
    model = random_model(CONFIG)
    batch, embed, _ = random_batch(CONFIG)
    hidden = model.teacher_forced_hidden(batch, embed)
    for row in range(2):
        for i, anchor in enumerate(batch.anchors[row].tolist()):
            alone = draft_hidden(model, batch.features[row], anchor, int(batch.token_ids[row, anchor]), embed)
            assert torch.allclose(hidden[row, i], alone, atol=1e-12)


def test_blocks_see_nothing_from_their_anchor_on() -> None:
    model = random_model(CONFIG)
    batch, embed, _ = random_batch(CONFIG)
    hidden = model.teacher_forced_hidden(batch, embed)
    tokens, features = batch.token_ids.clone(), batch.features.clone()
    tokens[0, 5:], features[0, 4:] = 7, 0.0  # the block at 4 reads its own token and features 0 .. 3
    changed = model.teacher_forced_hidden(dataclasses.replace(batch, token_ids=tokens, features=features), embed)
    assert torch.equal(changed[0, :2], hidden[0, :2]) and torch.equal(changed[1], hidden[1])
    assert not torch.allclose(changed[0, 2], hidden[0, 2])
    features = batch.features.clone()
    features[0, 3] = 0.0
    changed = model.teacher_forced_hidden(dataclasses.replace(batch, features=features), embed)
    assert torch.equal(changed[0, 0], hidden[0, 0]) and not torch.allclose(changed[0, 1], hidden[0, 1])


def test_blocks_do_not_see_each_other() -> None:
    model = random_model(CONFIG)
    batch, embed, _ = random_batch(CONFIG)
    hidden = model.teacher_forced_hidden(batch, embed)
    one = dataclasses.replace(batch, anchors=batch.anchors[:, 1:2], kept=batch.kept[:, 1:2])
    assert torch.allclose(model.teacher_forced_hidden(one, embed)[:, 0], hidden[:, 1], atol=1e-12)


def test_positions_of_a_block_see_each_other_both_ways() -> None:
    model = random_model(CONFIG)
    x = torch.randn(5, 16).double()

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * 8**-0.5, -1)
        return torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(2, 1))

    before, changed = model.block(x, torch.arange(5), attend), x.clone()
    changed[4] += 1
    assert not torch.allclose(model.block(changed, torch.arange(5), attend)[0], before[0])


def test_layers_are_those_of_transformers() -> None:
    """A block without context is a bidirectional pass through Qwen3's own layers."""
    model = random_model(DFLASH)
    keys = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
    )
    config = Qwen3Config(
        **{key: getattr(DFLASH, key) for key in keys},
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="eager",
    )
    x = torch.randn(1, 5, 16)
    positions = torch.arange(40, 45)[None]
    rotary, theirs = Qwen3RotaryEmbedding(config)(x, positions), x
    for i, layer in enumerate(model.float().layers):
        twin = Qwen3DecoderLayer(config, i)
        twin.load_state_dict(layer.state_dict())
        out = twin(theirs, position_embeddings=rotary, attention_mask=None)
        theirs = out[0] if isinstance(out, tuple) else out

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * 8**-0.5, -1)
        return torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(2, 1))

    assert torch.allclose(model.block(x[0], positions[0], attend), model.norm(theirs[0]), atol=1e-4)


def test_confidence_is_known_before_its_token() -> None:
    """c_k reads tokens up to k-1; the token drawn at k shows in c_{k+1} only."""
    model = random_model(CONFIG)
    hidden, previous = torch.randn(1, 5, 16).double(), torch.randint(0, 23, (1, 5))
    k = 2
    other = previous.clone()
    other[0, k + 1] = (other[0, k + 1] + 1) % 23  # previous[k + 1] is the token drawn at k
    before, after = (model.confidence(hidden, model.head.teacher_forced(p, hidden)[1]) for p in (previous, other))
    assert before is not None and after is not None
    assert torch.equal(before[0, : k + 1], after[0, : k + 1]) and before[0, k + 1] != after[0, k + 1]
    assert model.confidence(hidden[:, 0], None) is None if model.confidence_head is None else True
    assert random_model(DFLASH).confidence(hidden, None) is None


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_gradient_equals_finite_differences(kind: str) -> None:
    """Of the whole loss in fp64, along a random direction in every parameter. One step of the label is no slope."""
    model = random_model(dataclasses.replace(CONFIG, markov_head_type=kind))
    batch, embed, lm_head = random_batch(CONFIG)
    weights = LossWeights(confidence=0.0)  # its label moves with the parameters but carries no gradient
    model.loss(batch, embed, lm_head, weights).total.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("confidence_head"):
            continue
        direction = torch.randn_like(parameter)
        slope = float((parameter.grad * direction).sum())
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * 1e-6)
                values.append(float(model.loss(batch, embed, lm_head, weights).total))
                parameter.add_(direction, alpha=-sign * 1e-6)
        assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-3, abs=1e-6), name


def test_softcap_comes_before_the_bias() -> None:
    model = random_model(dataclasses.replace(CONFIG, final_logit_softcapping=2.0))
    lm_head = nn.Linear(16, 23, bias=False).double()
    hidden = torch.randn(3, 16).double() * 5
    assert torch.allclose(model.base_logits(hidden, lm_head), torch.tanh(lm_head(hidden) / 2) * 2)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("num_heads", [2, 6])
def test_flex_attention_sees_what_dense_attention_sees(num_heads):
    batch, length, size, anchors = 2, 9, 5, torch.tensor([[1, 4, 8], [2, 2, 7]])
    torch.manual_seed(0)
    cached = [tuple(torch.randn(2, batch * length, 2, 8)) for _ in range(2)]
    q, k, v = (torch.randn(batch * 3 * size, heads, 8) for heads in (num_heads, 2, 2))
    for layer in range(2):
        dense, flex = (kind(cached, anchors, size)(layer, q, k, v) for kind in (BlockAttention, FlexBlockAttention))
        torch.testing.assert_close(flex, dense, atol=1e-5, rtol=0)


@pytest.mark.parametrize("detached", [False, True])
def test_a_detached_confidence_loss_trains_its_head_alone(detached):
    model = random_model(CONFIG)
    weights = LossWeights(cross_entropy=0.0, total_variation=0.0, detach_confidence=detached)
    model.loss(*random_batch(CONFIG), weights).total.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert "confidence_head.proj.weight" in reached
    assert ({"fc.weight", "markov_head.markov_w1.weight"} <= reached) is not detached
    assert not detached or reached <= {"confidence_head.proj.weight", "confidence_head.proj.bias"}
