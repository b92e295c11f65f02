"""What a step says of itself is what happened in it, counted by somebody else."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from dspark.budget.beliefs import LiveBeliefs, LiveSettings
from dspark.drafters.draft_model import SelfDrafter
from dspark.engine.batcher import is_reading
from dspark.engine.engine import Engine
from dspark.sampling import law
from dspark.types import Draft, Load, Request, Rule, SamplingParams, Span, StepRecord
from engine.models import VOCAB_SIZE, Known, OracleDrafter, random_target
from engine.spies import Fickle, interrupt


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return random_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def prompts():
    rng = random.Random(0)
    system = [rng.randrange(VOCAB_SIZE) for _ in range(35)]
    return [system[: 5 * i] + [rng.randrange(VOCAB_SIZE) for _ in range(4 * (i % 4) + 1)] for i in range(8)]


@pytest.fixture(scope="module")
def texts(target, prompts):
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=60) for i in range(len(prompts))]
    return [g.prompt_token_ids + g.token_ids for g in Engine(target).generate(prompts, params)]


class Asked(OracleDrafter):
    """Writes down what it was asked and what it said. A draft has a confidence for every token."""

    feature_layers = (1,)
    num_features = 0

    def propose(self, requests: Sequence[Request], rule: Rule) -> Draft:
        self.num_features = sum(0 if r.features is None else len(r.features) for r in requests)
        draft = self.guess(requests, rule)
        draft.confidence = torch.rand(draft.tokens.shape, generator=torch.Generator().manual_seed(len(requests)))
        if draft.parents is not None:  # some go on from the decoy, where nobody gets
            is_lost = torch.rand(draft.parents.shape, generator=torch.Generator().manual_seed(len(requests))) < 0.1
            draft.parents = torch.where(is_lost & (draft.parents >= 0), draft.parents ^ 1, draft.parents)
        self.said = {r.id: b for b, r in enumerate(requests)}
        self.draft = draft
        return draft

    def guess(self, requests: Sequence[Request], rule: Rule) -> Draft:
        return super().propose(requests, rule)


class Drawn(Asked):
    """Guesses are drawn from the law of the target's first layers, whatever the text has become."""

    def __init__(self, target, length: int) -> None:
        super().__init__([], length)
        self.first_layers = SelfDrafter(target, 2, length)

    def guess(self, requests: Sequence[Request], rule: Rule) -> Draft:
        return self.first_layers.propose(requests, rule)


class Anything:
    """Keeps parts of drafts that are closed under ancestors, by no rule. It looks at no token."""

    anticipates = False

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def choose(self, draft: Draft, survival: torch.Tensor, load: Load) -> torch.Tensor:
        keep = torch.zeros(draft.tokens.shape, dtype=torch.bool)
        for b, size in enumerate(draft.sizes.tolist()):
            for k in range(size):
                parent = k - 1 if draft.parents is None else int(draft.parents[b, k])
                keep[b, k] = (parent < 0 or bool(keep[b, parent])) and self.rng.random() < 0.8
        return keep


class Tally:
    """Counts from what the target is given to read and from what requests have afterwards."""

    def __init__(self, engine: Engine, drafter: Asked) -> None:
        self.engine, self.drafter, self.extend = engine, drafter, engine.target.extend
        self.spans: list[Span] = []
        engine.target.extend = self._extend

    def _extend(self, spans, layers=()):
        self.spans, self.before = list(spans), {r.id: list(r.tokens) for r in self.engine.batcher.running}
        self.requests = {r.id: r for r in self.engine.batcher.running}
        self.reading = {r.id for r in self.engine.batcher.running if is_reading(r)}
        self.with_room = [r.id for r in self.engine.batcher.running if self.engine.ledger.room(r) > 1]
        out = self.extend(spans, layers)
        self.logits = dict(
            zip((s.request_id for s in spans), out.logits.split([s.num_logits for s in spans]), strict=True)
        )
        return out

    def step(self) -> StepRecord:
        engine = self.engine
        self.spans, self.drafter.said, self.drafter.num_features = [], {}, 0
        was_torn, running = engine.ledger.is_torn, set(engine.batcher.running)
        done = {r: len(r.rounds) for r in (*engine.batcher.running, *engine.batcher.waiting)}
        record = engine.step()
        # After an interrupt all are set aside, which is no preemption.
        assert was_torn or record.num_preempted == len(running & set(engine.batcher.waiting))
        assert record.num_waiting == len(engine.batcher.waiting)
        assert record.num_running == len(engine.batcher.running)
        assert record.num_free_slots == engine.target.num_free_slots
        if self.spans:
            self._check(record, done)
        return record

    def _check(self, record: StepRecord, done: dict[Request, int]) -> None:
        decoding = [s for s in self.spans if s.request_id not in self.reading]
        assert record.request_ids == [s.request_id for s in decoding]
        num_prompt = sum(len(s.tokens) for s in self.spans if s.request_id in self.reading)
        assert record.num_prompt_tokens == record.load.num_prompt_tokens == num_prompt
        assert record.num_context_tokens == record.load.context_tokens == sum(s.start for s in self.spans)
        assert record.num_tokens == sum(len(s.tokens) for s in self.spans)
        assert record.load.base_tokens == num_prompt + len(decoding)
        assert record.load.num_requests == len(self.spans)
        said = self.drafter.said
        assert (record.num_asked, record.num_unread) == (len(said), self.drafter.num_features)
        able = [s.request_id for s in decoding if s.request_id in self.with_room]
        assert record.num_skipped == len(able) - len(said) and set(said) <= set(able)
        assert record.kept is not None and record.accepted_nodes is not None
        for b, span in enumerate(decoding):
            request, row = self.requests[span.request_id], said.get(span.request_id)
            draft = self.drafter.draft
            size = 0 if row is None else int(draft.sizes[row])
            nodes = record.kept[b].nonzero()[:, 0].tolist()
            assert record.drafted[b] == size and record.verified[b] == len(nodes) == len(span.tokens) - 1
            if row is not None:
                assert draft.tokens[row][nodes].tolist() == list(span.tokens[1:])
            path = self._path(span, request)
            accepted = record.accepted_nodes[b].nonzero()[:, 0].tolist()
            assert record.accepted[b] == len(accepted)
            if request.finish_reason is not None and self._known_text(request) is None:
                accepted = accepted[: len(path)]  # of what was accepted beyond the end, no text says anything
            assert accepted == [nodes[i - 1] for i in path]
            if len(request.rounds) > done[request]:
                last = request.rounds[-1]
                assert (last.drafted, last.verified, last.accepted) == (size, len(nodes), record.accepted[b])
            num_new = len(request.tokens) - len(self.before[request.id])
            assert num_new == len(path) + 1 if request.finish_reason is None else 1 <= num_new <= len(path) + 1

    def _known_text(self, request: Request) -> list[int] | None:
        return next((t for t in self.drafter.texts if t[: len(request.tokens)] == request.tokens), None)

    def _path(self, span: Span, request: Request) -> list[int]:
        """Places in the span of the tokens that the text goes through, as far as it is known to go."""
        text = self._known_text(request) or request.tokens
        parents = range(-1, len(span.tokens) - 1) if span.parents is None else span.parents
        path, at = [], 0
        for token in text[span.start + 1 :]:
            found = [i for i, p in enumerate(parents) if i and p == at and span.tokens[i] == token]
            if not found:
                break
            at = found[0]
            path.append(at)
        return path


def labels(tally: Tally, record: StepRecord) -> dict[tuple[int, int], float]:
    """Of what was read after accepted tokens only, as long as the request went on, by request and node: was it accepted, or
    where draws are judged by their laws, what these have in common."""
    found = {}
    assert record.kept is not None and record.accepted_nodes is not None
    for b, request_id in enumerate(record.request_ids):
        request = tally.requests[request_id]
        num_new = len(request.tokens) - len(tally.before[request_id])
        depth: dict[int, int] = {-1: 0}
        for k in record.kept[b].nonzero()[:, 0].tolist():
            parent = k - 1 if record.parents is None else int(record.parents[b, k])
            depth[k] = depth[parent] + 1
            is_reached = parent < 0 or bool(record.accepted_nodes[b, parent])
            if is_reached and (request.finish_reason != "stop" or depth[k] <= num_new):
                found[b, k] = float(record.accepted_nodes[b, k])
                if tally.drafter.draft.probs is not None:
                    temperature = torch.full((1, 1), float(request.params.temperature), dtype=torch.double)
                    judge = law(tally.logits[request_id][[depth[parent]]].double(), temperature)[0]
                    drawn_from = tally.drafter.draft.probs[tally.drafter.said[request_id], k]
                    found[b, k] = float(torch.minimum(judge, drawn_from).sum())
    return found


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("rule", ["coupled", "rejection"])
@pytest.mark.parametrize(("num_positions", "share_interrupted"), [(12, 0.0), (2, 0.1)])
def test_records_and_labels_are_what_happened(target, prompts, texts, tree, rule, num_positions, share_interrupted):
    rng, limit = random.Random(1), target.cache.limit
    target.resize(130)
    is_drawn = rule == "rejection" and not tree
    drafter = Drawn(target, 6) if is_drawn else Asked(texts, length=6, tree=tree, error=0.15)
    beliefs = LiveBeliefs(None, num_positions, LiveSettings(full_share=0.2, rounds_per_update=10**9))
    engine = Engine(
        target,
        drafter,
        Anything(rng),
        rule,
        guard=Fickle(rng),
        beliefs=beliefs,
        capacity=Known(),
        max_num_seqs=4,
        max_num_batched_tokens=16,
        prefix_tokens=64,
    )
    tally, records, num_labels = Tally(engine, drafter), [], 0
    joining = list(range(len(prompts))) * 5
    rng.shuffle(joining)
    requests: list[Request] = []
    while joining or engine.has_work:
        if joining and rng.random() < 0.4:
            i = joining.pop()
            stop = (texts[i][len(prompts[i]) + rng.randrange(3, 20)],) if rng.random() < 0.7 else ()
            own = SamplingParams(temperature=i % 2, seed=i, max_tokens=rng.randrange(1, 40), stop_token_ids=stop)
            requests.append(engine.submit(prompts[i], own))
        if rng.random() < share_interrupted:
            interrupt(engine, rng)
        beliefs._waiting.clear()
        record = tally.step()
        records.append(record)
        if record.kept is not None and record.kept.shape[1]:
            expected = labels(tally, record)
            noted = {
                divmod(int(token), record.kept.shape[1]): float(happened)
                for o in beliefs._waiting
                for token, happened in zip(o.judged.tokens, o.judged.happened, strict=True)
            }
            assert noted == pytest.approx(expected)
            num_labels += len(expected)
    del target.extend
    target.resize(limit)
    assert {r.finish_reason for r in requests} == {"stop", "length"}
    assert (
        num_labels > 100
        and any(r.chances is not None and r.chances.numel() for r in records) == is_drawn
        and sum(r.num_skipped for r in records) > 20
    )
    assert sum(r.num_preempted for r in records) > 0 and sum(r.num_prefix_found for r in records) > 100
    if not share_interrupted:  # which takes its record with it
        assert sum(r.num_prefix_found for r in records) == sum(r.num_prompt_found for r in requests)
        assert sum(r.num_prefix_asked for r in records) == sum(r.num_prompt_tokens for r in requests)
    # However often it was read, what a request finds is what others left: whole runs that they share.
    first = requests[0]
    assert (first.num_prompt_found, *(r.num_prompt_found % 16 for r in requests)) == (0,) * (1 + len(requests))
