"""A random block drafter, and what it must draft: DeepSpec's formulas in plain loops, made anew and without a cache."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from dspark.drafters.block import BlockDrafter
from dspark.drafters.block_model import BlockConfig, BlockModel
from dspark.sampling import KeyedDraws
from dspark.types import Draft, Drafter, Request, SamplingParams
from dspark.verify import Coupled, Rejection

VOCAB, HIDDEN, BLOCK = 48, 32, 5

CONFIG = BlockConfig(
    hidden_size=HIDDEN,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=VOCAB,
    target_layer_ids=(-1, 1),
    block_size=BLOCK,
    mask_token_id=1,
    num_target_layers=4,
    markov_rank=6,
    enable_confidence_head=True,
    confidence_head_with_markov=True,
)
DFLASH = dataclasses.replace(CONFIG, markov_rank=0, enable_confidence_head=False, confidence_head_with_markov=False)


class FedByHand:
    """A drafter under test, and the features of any number of requests, handed to it as the engine does."""

    drafter: Drafter
    draws: KeyedDraws
    all_features: dict[int, Tensor]

    def request(self, id: int, num_tokens: int, **params: float) -> Request:
        tokens = torch.randint(2, VOCAB, (num_tokens,), generator=torch.Generator().manual_seed(id)).tolist()
        request = Request(id, tokens, SamplingParams(**params), num_tokens, seed=100 + id, num_cached=num_tokens - 1)
        self.all_features[id] = torch.randn(
            200, 2 * HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1000 + id)
        )
        request.features = self.all_features[id][: num_tokens - 1]
        return request

    def commit(self, request: Request, tokens: list[int], asked: bool = True) -> None:
        """As the engine does after a step; without `asked` the drafter has not seen the features that were there."""
        start = request.num_cached if asked else request.features_start
        request.tokens += tokens
        request.num_cached = len(request.tokens) - 1
        request.features_start, request.features = start, self.all_features[request.id][start : request.num_cached]

    def propose(self, requests: list[Request], rule: Coupled | Rejection | None = None) -> Draft:
        return self.drafter.propose(requests, rule or Coupled(self.draws))


class Pair(FedByHand):
    """A random drafter, and its target's embedding and head."""

    def __init__(self, config: BlockConfig = CONFIG, **options: int | None) -> None:
        torch.manual_seed(0)
        self.model = BlockModel(config).double().eval()
        for parameter in self.model.parameters():  # larger than at the start of training, so that everything matters
            nn.init.normal_(parameter, std=0.5)
        self.embed = nn.Embedding(VOCAB, HIDDEN).double()
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False).double()
        self.drafter = BlockDrafter(self.model, self.embed, self.lm_head, **options)
        self.draws = KeyedDraws(VOCAB)
        self.all_features: dict[int, Tensor] = {}
        self.requests: dict[int, Request] = {}

    def expected(self, request: Request, window: int | None = None) -> tuple[list[int], list[float]]:
        """tokens and confidence of one request by the formulas of the paper, from the state dict alone."""
        hidden = naive_block(
            self.model.state_dict(),
            self.model.config,
            self.embed,
            request.tokens[-1],
            self.all_features[request.id][: request.num_cached],
            window,
        )
        rule, drawn, confidence = Coupled(self.draws), [], []
        w = self.model.state_dict()
        for k in range(BLOCK):
            e = w["markov_head.markov_w1.weight"][([request.tokens[-1], *drawn])[k]]
            logits = self.lm_head.weight @ hidden[k] + w["markov_head.markov_w2.weight"] @ e
            z = w["confidence_head.proj.weight"][0] @ torch.cat([hidden[k], e]) + w["confidence_head.proj.bias"][0]
            confidence.append(float(torch.sigmoid(z)))
            drawn.append(int(rule.draft(logits[None], [request], [drawn])[0]))
        return drawn, confidence


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def rotate(x: Tensor, position: int) -> Tensor:
    """x [heads, D]: pairs (i, i + D/2) turned by position * theta^(-2i/D), as complex numbers."""
    half = x.shape[-1] // 2
    angle = position * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


def naive_block(
    w: dict[str, Tensor], config: BlockConfig, embed: nn.Module, anchor: int, features: Tensor, window: int | None
) -> Tensor:
    """[K, H]  one block after `features` [S, F]: keys and values of context and block made anew and concatenated."""
    first = 0 if window is None else max(0, len(features) - window)
    context = [rms(w["fc.weight"] @ f, w["hidden_norm.weight"]) for f in features[first:]]
    ids = torch.tensor([anchor] + [config.mask_token_id] * (config.block_size - 1))
    x = list(embed(ids).detach())
    positions = list(range(first, len(features) + config.block_size))
    for layer in range(config.num_hidden_layers):
        p = {name.removeprefix(f"layers.{layer}."): t for name, t in w.items() if name.startswith(f"layers.{layer}.")}
        y = [rms(row, p["input_layernorm.weight"]) for row in x]
        keys, values = [], []
        for row, position in zip(context + y, positions, strict=True):
            k = (p["self_attn.k_proj.weight"] @ row).view(-1, config.head_dim)
            keys.append(rotate(rms(k, p["self_attn.k_norm.weight"]), position))
            values.append((p["self_attn.v_proj.weight"] @ row).view(-1, config.head_dim))
        for j in range(config.block_size):
            q = (p["self_attn.q_proj.weight"] @ y[j]).view(-1, config.head_dim)
            q = rotate(rms(q, p["self_attn.q_norm.weight"]), len(features) + j)
            heads = []
            for h in range(config.num_attention_heads):
                kv = h * config.num_key_value_heads // config.num_attention_heads
                scores = torch.stack([k[kv] @ q[h] for k in keys]) / config.head_dim**0.5
                heads.append(scores.softmax(0) @ torch.stack([v[kv] for v in values]))
            x[j] = x[j] + p["self_attn.o_proj.weight"] @ torch.cat(heads)
        for j in range(config.block_size):
            z = rms(x[j], p["post_attention_layernorm.weight"])
            gate, up = p["mlp.gate_proj.weight"] @ z, p["mlp.up_proj.weight"] @ z
            x[j] = x[j] + p["mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * up)
    return torch.stack([rms(row, w["norm.weight"]) for row in x])


def assert_as_expected(pair: Pair, requests: list[Request], draft: Draft, window: int | None = None) -> None:
    assert draft.confidence is not None and draft.sizes.tolist() == [BLOCK] * len(requests)
    for row, request in enumerate(requests):
        tokens, confidence = pair.expected(request, window)
        assert draft.tokens[row].tolist() == tokens
        torch.testing.assert_close(draft.confidence[row], torch.tensor(confidence), atol=1e-6, rtol=1e-5)
