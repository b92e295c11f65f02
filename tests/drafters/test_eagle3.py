"""The runtime EAGLE-3 drafter against its formulas in plain loops, made anew for every step and without a cache."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from drafters.formulas import HIDDEN, VOCAB, FedByHand, rms, rotate
from dspark.drafters.block_model import TraceBatch
from dspark.drafters.eagle3 import Eagle3Drafter
from dspark.drafters.eagle3_model import Eagle3Config, Eagle3Model
from dspark.errors import InvalidConfiguration
from dspark.sampling import KeyedDraws
from dspark.types import Draft, Request, SamplingParams
from dspark.verify import Coupled, Rejection

LENGTH = 4

CONFIG = Eagle3Config(
    hidden_size=HIDDEN,
    intermediate_size=40,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=VOCAB,
    target_layer_ids=(0, 2),
    num_target_layers=4,
    ttt_length=LENGTH,
)
LLAMA = dataclasses.replace(CONFIG, model_type="llama", norm_before_residual=True)
REDUCED = dataclasses.replace(CONFIG, draft_vocab_size=20)
KNOWN = torch.arange(3, VOCAB, 2)[:20]


class Pair(FedByHand):
    """A random drafter, and its target's embedding and head."""

    def __init__(self, config: Eagle3Config = CONFIG, **options: int | None) -> None:
        torch.manual_seed(0)
        self.model = Eagle3Model(config).double().eval()
        for parameter in self.model.parameters():  # larger than at the start of training, so that everything matters
            nn.init.normal_(parameter, std=0.5)
        nn.init.normal_(self.model.layer.self_attn.o_proj.weight, std=4.0)  # or the past would hardly matter
        self.embed = nn.Embedding(VOCAB, HIDDEN).double()
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False).double()
        head = self.lm_head
        if config.draft_vocab_size:
            self.model.choose_vocabulary(KNOWN.flip(0))
            head = nn.Linear(HIDDEN, len(KNOWN), bias=False).double()
            head.weight = nn.Parameter(self.lm_head.weight[KNOWN])
        self.drafter = Eagle3Drafter(self.model, self.embed, head, **options)
        self.draws = KeyedDraws(VOCAB)
        self.all_features: dict[int, Tensor] = {}

    def expected(self, request: Request, window: int | None = None) -> list[int]:
        """The draft of one request by the formulas alone."""
        drawn: list[int] = []
        rule = Coupled(self.draws)
        for _ in range(LENGTH):
            logits = self.naive_logits(request.tokens + drawn, len(request.tokens), request.id, window)
            drawn.append(int(rule.draft(logits[None], [request], [drawn])[0]))
        return drawn

    def naive_logits(self, tokens: list[int], num_known: int, id: int, window: int | None) -> Tensor:
        """[V]  after `tokens`, of which the target has read the first num_known - 1."""
        w, config = self.model.state_dict(), self.model.config
        p = {name.removeprefix("layers.0."): t for name, t in w.items()}
        fused = [w["fc.weight"] @ f for f in self.all_features[id][: num_known - 1]]
        keys, values, x = [], [], None
        for i in range(len(tokens) - 1):
            x = fused[i] if i < len(fused) else x
            assert x is not None
            y = torch.cat([rms(self.embed.weight[tokens[i + 1]], p["input_layernorm.weight"]),
                           rms(x, p["hidden_norm.weight"])])  # fmt: skip
            k, q = ((p[f"self_attn.{n}_proj.weight"] @ y).view(-1, config.head_dim) for n in "kq")
            if config.model_type == "qwen3":
                k, q = rms(k, p["self_attn.k_norm.weight"]), rms(q, p["self_attn.q_norm.weight"])
            keys.append(rotate(k, i))
            values.append((p["self_attn.v_proj.weight"] @ y).view(-1, config.head_dim))
            if i < num_known - 2:
                continue  # a row whose output nobody asks for
            first = 0 if window is None else max(0, num_known - 1 - window)
            q, heads = rotate(q, i), []
            for h in range(config.num_attention_heads):
                kv = h * config.num_key_value_heads // config.num_attention_heads
                scores = torch.stack([k[kv] @ q[h] for k in keys[first:]]) / config.head_dim**0.5
                heads.append(scores.softmax(0) @ torch.stack([v[kv] for v in values[first:]]))
            residual = y[HIDDEN:] if config.norm_before_residual else x
            x = residual + p["self_attn.o_proj.weight"] @ torch.cat(heads)
            z = rms(x, p["post_attention_layernorm.weight"])
            gate, up = p["mlp.gate_proj.weight"] @ z, p["mlp.up_proj.weight"] @ z
            x = x + p["mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)
        logits = self.lm_head.weight @ rms(x, w["norm.weight"])
        if config.draft_vocab_size:
            logits[[t for t in range(VOCAB) if t not in KNOWN]] = float("-inf")
        return logits


def assert_as_expected(pair: Pair, requests: list[Request], draft: Draft, window: int | None = None) -> None:
    assert draft.confidence is None and draft.sizes.tolist() == [LENGTH] * len(requests)
    for row, request in enumerate(requests):
        assert draft.tokens[row].tolist() == pair.expected(request, window)


@pytest.mark.parametrize("config", [CONFIG, LLAMA, REDUCED], ids=["qwen3", "llama", "reduced"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ragged_batch_equals_the_formulas(config: Eagle3Config, temperature: float) -> None:
    pair = Pair(config)
    requests = [pair.request(id, n, temperature=temperature) for id, n in enumerate([9, 2, 23])]
    assert_as_expected(pair, requests, pair.propose(requests))


def test_history_matters() -> None:
    """The pair under test would hide a wrong cache if its drafts did not depend on the context."""
    pair = Pair()
    request = pair.request(0, 12)
    before = pair.naive_logits(request.tokens, 12, 0, None)
    pair.all_features[0][3].neg_()
    assert (pair.naive_logits(request.tokens, 12, 0, None) - before).abs().max() > 0.05


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
    pair.commit(d, [5])
    assert_as_expected(pair, [d, c], pair.propose([d, c]))


def test_features_of_skipped_steps() -> None:
    pair = Pair()
    a, b = pair.request(0, 9), pair.request(1, 5)
    pair.propose([a, b])
    pair.commit(a, [7, 8])
    pair.commit(b, [7])
    pair.propose([b])
    pair.commit(a, [9, 10, 11], asked=False)
    assert_as_expected(pair, [a], pair.propose([a]))


def test_release_starts_over_and_leaks_no_row() -> None:
    pair = Pair()
    requests = [pair.request(id, 5 + id) for id in range(6)]
    for request in requests:
        pair.propose([request])
    for id in (0, 5, 2, 3, 1, 77, 4, 4):
        pair.drafter.release(id)
    assert pair.drafter.rows.num_rows == 0
    pair.commit(requests[3], [7, 8, 9])
    requests[3].features_start, requests[3].features = 0, pair.all_features[3][: requests[3].num_cached]
    assert_as_expected(pair, requests[3:4], pair.propose(requests[3:4]))
    assert len(pair.drafter.rows.keys[0]) <= 8


def test_a_prompt_of_one_token_has_no_feature_to_start_from() -> None:
    pair = Pair()
    a, b = pair.request(0, 1), pair.request(1, 4)
    draft = pair.propose([a, b])
    assert draft.sizes.tolist() == [0, LENGTH] and draft.tokens[1].tolist() == pair.expected(b)
    assert pair.propose([a]).tokens.shape == (1, 0)
    pair.commit(a, [4], asked=False)
    assert_as_expected(pair, [a], pair.propose([a]))


@pytest.mark.parametrize("window", [3, 8, 300])
def test_window_keeps_the_newest_positions(window: int) -> None:
    pair = Pair(window=window)
    requests = [pair.request(id, n) for id, n in enumerate([9, 2, 23])]
    for step in range(4):
        assert_as_expected(pair, requests, pair.propose(requests), window)
        for request in requests:
            pair.commit(request, [4 + step] * (1 + (request.id + step) % 5))
    assert pair.drafter.rows.keys[0].shape[1] <= LENGTH + window


@pytest.mark.parametrize("config", [CONFIG, REDUCED], ids=["full", "reduced"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_drawing_ahead_equals_drawing_by_the_rule(config: Eagle3Config, temperature: float) -> None:
    ahead, by_rule = Pair(config), Pair(config)
    requests = [ahead.request(id, n, temperature=temperature) for id, n in enumerate([9, 2, 23])]
    expected = ahead.propose(requests).tokens.tolist()
    # A bias of nothing leaves the law alone, and the rule must be asked for it all the same.
    asked = dataclasses.replace(requests[0].params, logit_bias={0: 0.0})
    assert by_rule.propose([dataclasses.replace(r, params=asked) for r in requests]).tokens.tolist() == expected


@pytest.mark.parametrize("config", [CONFIG, REDUCED], ids=["full", "reduced"])
def test_rejection_rule_gets_the_laws(config: Eagle3Config) -> None:
    pair = Pair(config)
    requests = [pair.request(id, n, temperature=0.8) for id, n in enumerate([9, 2])]
    draft = pair.propose(requests, Rejection(pair.draws))
    assert draft.probs is not None and draft.probs.shape == (2, LENGTH, VOCAB)
    torch.testing.assert_close(draft.probs.sum(-1), torch.ones(2, LENGTH), check_dtype=False)
    assert (draft.probs.gather(-1, draft.tokens[..., None]) > 0).all()
    if config.draft_vocab_size:
        assert set(draft.tokens.flatten().tolist()) <= set(KNOWN.tolist())
        assert float(draft.probs.sum((0, 1))[[t for t in range(VOCAB) if t not in KNOWN]].sum()) == 0


@pytest.mark.parametrize("option", [{"length": 0}, {"window": 0}])
def test_senseless_options(option: dict[str, int]) -> None:
    with pytest.raises(InvalidConfiguration, match=f"{next(iter(option))} must be"):
        Pair(**option)


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


@pytest.mark.parametrize("config", [CONFIG, LLAMA], ids=["qwen3", "llama"])
def test_training_logits_equal_runtime_logits(config: Eagle3Config) -> None:
    pair = Pair(config)
    texts = [pair.request(id, 30) for id in (0, 1)]
    features = torch.stack([torch.cat([t.features, torch.zeros(1, 2 * HIDDEN)]) for t in texts])
    anchors = torch.tensor([[1, 11, 20], [4, 5, 24]])
    batch = TraceBatch(
        torch.tensor([t.tokens for t in texts]), torch.ones(2, 30), features, torch.zeros(2, 30, HIDDEN), anchors, anchors > 0
    )  # fmt: skip
    hidden = pair.model.teacher_forced_hidden(batch, pair.embed)
    for row, text in enumerate(texts):
        for anchor, trained in zip(anchors[row].tolist(), hidden[row], strict=True):
            teacher = Scripted(text.tokens[anchor + 1 :])
            request = Request(
                100 * row + anchor, text.tokens[: anchor + 1], SamplingParams(), 1,
                num_cached=anchor, features=text.features[:anchor],
            )  # fmt: skip
            pair.drafter.propose([request], teacher)
            torch.testing.assert_close(torch.stack(teacher.logits), pair.lm_head(trained).float(), atol=1e-4, rtol=1e-5)
