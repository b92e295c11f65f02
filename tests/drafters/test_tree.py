"""Trees: every node is as likely as its own path says, the right path is found, and the text never changes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dspark.budget.prefix_scheduler import FixedLength
from dspark.drafters.block import BlockDrafter
from dspark.drafters.block_model import BlockConfig, BlockModel
from dspark.drafters.draft_model import DraftModelDrafter, SelfDrafter
from dspark.drafters.eagle3 import Eagle3Drafter
from dspark.drafters.eagle3_model import Eagle3Config, Eagle3Model
from dspark.drafters.tree import Grower, TreeDrafter
from dspark.engine.engine import Engine
from dspark.errors import InvalidConfiguration
from dspark.sampling import KeyedDraws
from dspark.target.target import Target
from dspark.types import Draft, Request, SamplingParams, Span
from dspark.verify import Coupled, Rejection
from engine.models import VOCAB_SIZE, Known, random_target, reference_features
from enumeration import Table, decode_law, distance, random_table, target_law

SHAPE: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=VOCAB_SIZE,
    target_layer_ids=(0, 1),
    num_target_layers=3,
)
BLOCK: dict[str, Any] = dict(num_hidden_layers=2, block_size=4, mask_token_id=1)
PROMPTS = [[3, 4, 5], [6, 7, 8, 9, 10, 11, 12, 13, 14], [15, 16], [17, 18, 19, 20, 21]]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return random_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(autouse=True)
def tidy(target: Target) -> Iterator[None]:
    """Requests that a test made by itself leave the target with it."""
    yield
    for request_id in target.cache.request_ids:
        target.release(request_id)


def make_grower(kind: str, target: Target, tmp_path: Path) -> Grower:
    torch.manual_seed(1)
    embed, head = target.model.get_input_embeddings(), target.model.get_output_embeddings()
    if kind == "draft model":
        return DraftModelDrafter(random_target(tmp_path, seed=1, num_layers=2), length=4)
    if kind == "self":
        return SelfDrafter(target, num_layers=2, length=4)
    if kind == "eagle3":
        return Eagle3Drafter(randomised(Eagle3Model(Eagle3Config(**SHAPE))), embed, head, length=4, num_scratch=9)
    heads: dict[str, Any] = {"dflash": {"markov_rank": 0}}.get(kind, {"markov_rank": 8, "markov_head_type": kind})
    return BlockDrafter(randomised(BlockModel(BlockConfig(**SHAPE, **BLOCK, **heads))), embed, head)


def randomised(model: Any) -> Any:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


class Scripted:
    """Draws what it was told, and keeps the logits it was shown."""

    allows_anticipation = True

    def __init__(self, path: Sequence[int], length: int) -> None:
        self.tokens = [*path, *[0] * (length - len(path))]
        self.logits: list[Tensor] = []

    def draft(self, logits: Tensor, requests: Sequence[Request], previous: Any) -> tuple[Tensor, None]:
        self.logits.append(logits[0])
        return torch.tensor([self.tokens[len(previous[0])]]), None

    def noise_ahead(self, requests: Sequence[Request], length: int) -> None:
        return None


def asked(target: Target, id: int, tokens: list[int], temperature: float = 0.0) -> Request:
    if not target.cache.length(id):
        target.extend([Span(id, 0, tokens[:-1])])
    features = reference_features(target, tokens[:-1], SHAPE["target_layer_ids"])
    params = SamplingParams(temperature=temperature)
    return Request(id, tokens, params, len(tokens), seed=7 + id, num_cached=len(tokens) - 1, features=features)


def paths_of(draft: Draft, b: int) -> list[list[int]]:
    """Per node its tokens from the anchor on."""
    assert draft.parents is not None
    paths: list[list[int]] = []
    for token, parent in zip(draft.tokens[b].tolist(), draft.parents[b].tolist(), strict=True):
        paths.append([*([] if parent < 0 else paths[parent]), token])
    return paths


@pytest.mark.parametrize("kind", ["draft model", "self", "eagle3", "dflash", "vanilla", "gated", "rnn"])
def test_a_node_is_as_likely_as_drafting_its_path_says(kind: str, target: Target, tmp_path: Path) -> None:
    """The oracle is the chain, which sees one path only: a wrong mask, parent, position or state shows here."""
    grower = make_grower(kind, target, tmp_path)
    tree, rule = TreeDrafter(grower, size=30, width=3), Coupled(KeyedDraws(VOCAB_SIZE))
    requests = [asked(target, id, tokens) for id, tokens in enumerate(PROMPTS)]
    draft = tree.propose(requests, rule)
    assert draft.confidence is not None and draft.sizes.tolist() == [30] * 4
    depths = set()
    for b, tokens in enumerate(PROMPTS):
        paths = paths_of(draft, b)
        assert len({tuple(path) for path in paths}) == 30
        score = [draft.confidence[b, [paths.index(p[: k + 1]) for k in range(len(p))]].prod() for p in paths]
        assert all(before >= after * 0.9999 for before, after in pairwise(score)), "the likeliest come first"
        for path, confidence in zip(paths, draft.confidence[b].tolist(), strict=True):
            alone = Scripted(path, 4)
            grower.propose([asked(target, 100, tokens)], alone)  # type: ignore[attr-defined]
            grower.release(100)
            target.release(100)
            law = alone.logits[len(path) - 1].softmax(-1)
            assert confidence == pytest.approx(float(law[path[-1]]), rel=1e-3)
            assert int((law > law[path[-1]]).sum()) < 3, "one of the three likeliest followers"
            depths.add(len(path))
    assert depths == {1, 2, 3, 4}
    assert [target.cache.length(r.id) for r in requests] == [r.num_cached for r in requests], "as it was found"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_likeliest_is_what_the_coupled_rule_draws(temperature: float, target: Target) -> None:
    rule = Coupled(KeyedDraws(VOCAB_SIZE))
    requests = [asked(target, id, tokens, temperature) for id, tokens in enumerate(PROMPTS)]
    logits, previous = torch.randn(4, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)), [[1], [], [2, 3], [4]]
    outlook = rule.outlook(logits, requests, previous)
    assert outlook.argmax(-1).tolist() == rule.draft(logits, requests, previous)[0].tolist()
    torch.testing.assert_close(outlook.exp().sum(-1), torch.ones(4))


@dataclass
class Growing:
    requests: Sequence[Request]
    paths: list[list[list[int]]] = field(default_factory=list)


class KnowingGrower:
    """After a right path the right token is among its two likeliest, half of the time as the second."""

    feature_layers: tuple[int, ...] = ()

    def __init__(self, texts: Sequence[Sequence[int]], length: int = 4) -> None:
        self.texts, self.length = [list(t) for t in texts], length

    def able(self, requests: Sequence[Request]) -> list[int]:
        return list(range(len(requests)))

    def begin(self, requests: Sequence[Request]) -> tuple[Growing, Tensor]:
        return Growing(requests, [[] for _ in requests]), torch.stack([self.logits(r.tokens) for r in requests])

    def grow(self, growth: Growing, tokens: Tensor, parents: Tensor) -> Tensor:
        for b, paths in enumerate(growth.paths):
            news = zip(tokens[b].tolist(), parents[b].tolist(), strict=True)
            paths += [[*(paths[parent] if parent >= 0 else []), token] for token, parent in news]
        count = tokens.shape[1]
        rows = [
            [self.logits([*r.tokens, *p]) for p in paths[-count:]]
            for r, paths in zip(growth.requests, growth.paths, strict=True)
        ]
        return torch.stack([torch.stack(row) for row in rows])

    def logits(self, tokens: list[int]) -> Tensor:
        rng = random.Random(str(tokens))
        known = next((t for t in self.texts if t[: len(tokens)] == tokens and len(t) > len(tokens)), None)
        logits = torch.zeros(VOCAB_SIZE)
        if known is not None:
            right = known[len(tokens)]
            decoy = (right + 1 + rng.randrange(VOCAB_SIZE - 1)) % VOCAB_SIZE
            logits[[right, decoy]] = torch.tensor(rng.choice([(60.0, 59.0), (59.0, 60.0)]))
        return logits

    def release(self, request_id: int) -> None:
        pass


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_right_path_is_always_in_the_tree(batch: int, temperature: float, target: Target) -> None:
    """A chain of the same grower is wrong half of the time at every token; one parent astray would be as costly."""
    params = [SamplingParams(temperature=temperature, max_tokens=26, seed=i) for i in range(4)]
    plain = [Engine(target).generate([p], s)[0].token_ids for p, s in zip(PROMPTS, params, strict=True)]
    texts = [p + t for p, t in zip(PROMPTS, plain, strict=True)]
    engine = Engine(target, TreeDrafter(KnowingGrower(texts), size=10, width=2), "fixed:10", max_num_seqs=batch)
    for generation, expected in zip(engine.generate(PROMPTS, params), plain, strict=True):
        assert generation.token_ids == expected
        assert [r.accepted for r in generation.rounds[:-1]] == [4] * (len(generation.rounds) - 1)
    assert target.num_free_slots == target.cache.limit


@pytest.mark.parametrize("num_slots", [400, 60])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_tree_in_the_targets_own_slots_changes_no_text(temperature: float, num_slots: int, target: Target) -> None:
    """A small tree reads more tokens than it proposes, and they need room as well."""
    params = [SamplingParams(temperature=temperature, max_tokens=26, seed=i) for i in range(4)]
    plain = [Engine(target).generate([p], s)[0].token_ids for p, s in zip(PROMPTS, params, strict=True)]
    limit, records = target.cache.limit, []
    drafter = TreeDrafter(SelfDrafter(target, num_layers=2, length=4), size=5, width=3)
    engine = Engine(target, drafter, "fixed:9", num_slots=num_slots, observers=[records.append])
    assert [g.token_ids for g in engine.generate(PROMPTS, params)] == plain
    assert target.num_free_slots == num_slots and not sum(r.num_faults for r in records)
    assert sum(sum(r.accepted) for r in records) > 10
    assert (sum(r.num_preempted for r in records) > 0) == (num_slots == 60)
    target.resize(limit)


@pytest.mark.parametrize("scheduler", ["fixed:2", "threshold:0.3", "optimal", "lagged"])
@pytest.mark.parametrize("rule", ["coupled", "rejection"])
def test_schedulers_cut_trees(scheduler: str, rule: str, target: Target) -> None:
    if (scheduler, rule) == ("optimal", "rejection"):
        pytest.skip("it anticipates, and the engine refuses")
    params = [SamplingParams(temperature=0.0, max_tokens=26) for _ in PROMPTS]
    plain = [Engine(target).generate([p], s)[0].token_ids for p, s in zip(PROMPTS, params, strict=True)]
    grower = KnowingGrower([p + t for p, t in zip(PROMPTS, plain, strict=True)])
    engine = Engine(target, TreeDrafter(grower, size=12, width=3), scheduler, rule, capacity=Known())
    generations = engine.generate(PROMPTS, params)
    assert [g.token_ids for g in generations] == plain
    rounds = [r for g in generations for r in g.rounds]
    assert sum(r.accepted for r in rounds) > 20
    if scheduler in ("fixed:2", "threshold:0.3"):
        assert sum(r.verified for r in rounds) < 0.8 * sum(r.drafted for r in rounds)


class TableGrower(KnowingGrower):
    """Likelihoods from a table over prefixes."""

    def __init__(self, table: Table, length: int) -> None:
        self.table, self.length = table, length

    def logits(self, tokens: list[int]) -> Tensor:
        return torch.tensor(self.table(tuple(tokens)))


@pytest.mark.parametrize("rule", [Coupled, Rejection])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_law_is_the_targets(rule: Any, temperature: float) -> None:
    """Every branch of the real sampler, for a drafter that picks instead of drawing."""
    target, params = random_table(1), SamplingParams(temperature=temperature)
    drafter = TreeDrafter(TableGrower(random_table(2), length=2), size=4, width=2)
    law = decode_law(rule, drafter, FixedLength(9), target, 3, params)
    assert distance(law, target_law(target, 3, params)) < 1e-12


def test_what_is_excluded_is_not_drafted(target: Target) -> None:
    """top_k of 2 leaves two followers of every node: a wider tree has no third."""
    tree = TreeDrafter(KnowingGrower([[1] * 20], length=2), size=12, width=4)
    request = asked(target, 0, [1, 1, 1])
    request.params = SamplingParams(temperature=0.7, top_k=2)
    draft = tree.propose([request], Coupled(KeyedDraws(VOCAB_SIZE)))
    assert draft.confidence is not None and 2 <= int(draft.sizes) < 12
    assert bool((draft.confidence[draft.real] > 0).all()) and not bool(draft.confidence[~draft.real].any())


class Turns:
    """A grammar: tokens below and from 40 by turns."""

    text = "by turns"

    def matcher(self) -> Turns:
        return self

    def allowed(self, tokens: Sequence[int]) -> Tensor:
        return (torch.arange(VOCAB_SIZE) < 40) == (len(tokens) % 2 == 0)


def test_where_a_grammar_excludes_all_that_a_drafter_knows_it_drafts_what_comes_before(target: Target) -> None:
    """As EAGLE-3's may be, its vocabulary is smaller than the target's."""

    class Small(KnowingGrower):
        def logits(self, tokens: list[int]) -> Tensor:
            return super().logits(tokens).index_fill(0, torch.arange(40, VOCAB_SIZE), float("-inf"))

    params = SamplingParams(temperature=0.7, seed=3, max_tokens=20, grammar=Turns())
    [plain] = Engine(target).generate([PROMPTS[0]], params)
    records: list[Any] = []
    tree = TreeDrafter(Small([PROMPTS[0] + plain.token_ids], length=3), size=12, width=3)
    [generation] = Engine(target, tree, "fixed:12", observers=[records.append]).generate([PROMPTS[0]], params)
    assert generation.token_ids == plain.token_ids and not any(r.num_faults for r in records)
    assert {r.drafted for r in generation.rounds[:-1]} == {0, 3} and sum(r.accepted for r in generation.rounds) > 4


@pytest.mark.parametrize(
    ("options", "message"), [((0, 2), "1 to 14 tokens"), ((15, 2), "got size 15"), ((3, 0), "width")]
)
def test_senseless_trees(options: tuple[int, int], message: str) -> None:
    with pytest.raises(InvalidConfiguration, match=message):
        TreeDrafter(KnowingGrower([]), *options)
