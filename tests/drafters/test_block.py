"""The runtime drafter against DeepSpec's formulas in plain loops, made anew for every step and without a cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dspark.drafters.block import BlockDrafter
from dspark.drafters.block_model import BlockConfig, BlockModel, TraceBatch
from dspark.drafters.heads import MarkovHead, TabulatedHead, make_head
from dspark.errors import InvalidConfiguration
from dspark.sampling import KeyedDraws
from dspark.target import native
from dspark.target.captured import Outputs
from dspark.target.direct import Direct
from dspark.types import Draft, Request, SamplingParams
from dspark.verify import Coupled, Rejection
from target.tape import TapeRecorder

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


class Pair:
    """A random drafter, its target's embedding and head, and the features of any number of requests."""

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


def assert_equal_drafts(eager: Pair, other: Pair) -> None:
    """Whatever is accepted, joins or leaves."""
    for temperature in (1.0, 0.0):
        for ids in ([0], [0, 1], [1, 2, 3], [3], [3, 4, 1]):
            drafts = []
            for pair in (eager, other):
                requests = [pair.requests.setdefault(i, pair.request(i, 4 + 9 * i)) for i in ids]
                for request in requests:
                    request.params = SamplingParams(temperature=temperature)
                drafts.append(pair.propose(requests))
                for request in requests:
                    pair.commit(request, [5] * (1 + (request.id + len(ids)) % 4))
            assert drafts[0].tokens.tolist() == drafts[1].tokens.tolist()
            torch.testing.assert_close(drafts[0].confidence, drafts[1].confidence)


def test_without_a_compiler_it_drafts_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def build(self: Direct, **arguments: Any) -> Outputs:
        raise RuntimeError("no C++ compiler found\nand many lines more")

    monkeypatch.setattr(Direct, "build", build)
    eager, compiled = Pair(), Pair()
    compiled.drafter.compile()
    assert_equal_drafts(eager, compiled)
    assert caplog.messages == ["the drafter runs uncompiled: no C++ compiler found"]


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    config = dataclasses.replace(CONFIG, num_hidden_layers=1)
    eager, compiled = Pair(config), Pair(config)
    compiled.drafter.compile()
    assert_equal_drafts(eager, compiled)
    compiled.drafter.compile()  # by another engine
    assert_equal_drafts(eager, compiled)


def test_replayed_equals_eager() -> None:
    if not native.load():
        pytest.skip("recordings need a kernel, and this one needs a C++ compiler")
    eager, replayed, tape = Pair(CONFIG), Pair(CONFIG), TapeRecorder()
    replayed.drafter.capture(tape)
    for _ in range(2):
        assert_equal_drafts(eager, replayed)
    assert tape.num_replays > tape.num_recordings > 2
    requests = [replayed.requests[i] for i in (0, 1)]
    first = replayed.propose(requests)
    tokens = first.tokens.clone()
    for request in requests:
        replayed.commit(request, [7, 7])
    assert replayed.propose(requests).tokens.tolist() != tokens.tolist() == first.tokens.tolist()
    for request in requests:
        replayed.commit(request, [5] * 140)
    replayed.propose(requests)  # the rows have grown
    assert [replayed.propose([r]).tokens.tolist() for r in requests] == [[replayed.expected(r)[0]] for r in requests]


def test_drafts_that_cannot_be_recorded_are_made_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(run: Callable[[], Outputs]) -> Callable[[], Outputs]:
        raise RuntimeError("operation not permitted\nand much more text")

    pair = Pair(CONFIG)
    pair.drafter.capture(refuse)  # type: ignore[arg-type]
    request = pair.request(0, 9)
    for _ in range(2):
        assert pair.propose([request]).tokens.tolist() == [pair.expected(request)[0]]
        pair.commit(request, [5])
    assert [r.message for r in caplog.records] == ["drafts for 1 requests run unrecorded: operation not permitted"]


def test_the_kernel_for_cpu_attends_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of different lengths, and rows that are not the first ones."""
    if not native.load():
        pytest.skip("no C++ compiler")
    kernel, drafts = native.attend_slots, []
    for attend in (kernel, None):
        monkeypatch.setattr(native, "attend_slots", attend)
        pair = Pair(CONFIG)
        requests = [pair.request(i, 4 + 9 * i) for i in range(3)]
        drafts.append([pair.propose(asked) for asked in (requests, requests[1:], requests[2:])])
    for ours, theirs in zip(*drafts, strict=True):
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        torch.testing.assert_close(ours.confidence, theirs.confidence)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_a_head_for_drawing_gives_the_same_biases(kind: str) -> None:
    head = make_head(kind, 20, 8, 4)
    torch.nn.init.normal_(head.markov_w2.weight)
    drawing = head.for_drawing()
    assert isinstance(drawing, TabulatedHead) == (kind == "vanilla")
    previous, hidden = torch.tensor([3, 19, 0]), torch.randn(3, 8)
    state, expected_state = drawing.initial_state(3), head.initial_state(3)
    for _ in range(3):
        bias, e, state = drawing.step(previous, hidden, state)
        expected, expected_e, expected_state = head.step(previous, hidden, expected_state)
        torch.testing.assert_close(bias, expected)
        torch.testing.assert_close(e, expected_e)
        previous = bias.argmax(-1)


def test_a_large_vocabulary_is_not_tabulated() -> None:
    assert isinstance(make_head("vanilla", 4097, 8, 4).for_drawing(), MarkovHead)  # 4097² fp32 exceed 64 MiB
