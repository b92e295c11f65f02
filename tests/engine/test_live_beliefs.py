"""The engine feeds live beliefs, lets them ask for whole drafts, and writes the same text whatever they believe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from dspark import Draft, Engine, SamplingParams, StepRecord
from dspark.budget.beliefs import LiveBeliefs, LiveSettings
from dspark.types import Load, Request, Rule
from engine.models import OracleDrafter, random_target

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]


class Sceptic:
    """Verifies one token at most, because of what it believes."""

    anticipates = False

    def choose(self, draft: Draft, survival: torch.Tensor, load: Load) -> torch.Tensor:
        return draft.real & (draft.depth <= 1)


class Echo:
    """Expects the last two tokens again."""

    feature_layers: tuple[int, ...] = ()
    length = 2

    def propose(self, requests: Sequence[Request], rule: Rule) -> Draft:
        return Draft(torch.tensor([r.tokens[-2:] for r in requests]), torch.full((len(requests),), 2))

    def release(self, request_id: int) -> None:
        pass


def test_whole_drafts_are_verified_for_those_who_ask(tmp_path: Path) -> None:
    target = random_target(tmp_path)
    params = [SamplingParams(max_tokens=40, seed=i) for i in range(3)]
    plain = Engine(target).generate(PROMPTS, params)
    texts = [[*g.prompt_token_ids, *g.token_ids] for g in plain]

    def run(scheduler: object, share: float) -> tuple[list[StepRecord], LiveBeliefs]:
        records: list[StepRecord] = []
        beliefs = LiveBeliefs(num_positions=5, settings=LiveSettings(full_share=share))
        engine = Engine(
            target,
            OracleDrafter(texts),
            scheduler,
            beliefs=beliefs,
            observers=[records.append],  # type: ignore[arg-type]
        )
        assert [g.token_ids for g in engine.generate(PROMPTS, params)] == [g.token_ids for g in plain]
        beliefs.learn_waiting()
        return [r for r in records if r.kept is not None and r.kept.numel()], beliefs

    records, beliefs = run(Sceptic(), 1.0)
    assert all(torch.equal(r.chosen, r.kept & (torch.arange(r.kept.shape[1]) < 1)) for r in records)
    assert any((r.kept.sum(1) > 1).any() for r in records) and beliefs.num_full > 5
    learned = sum(beliefs.running_error.num_tokens)
    records, beliefs = run(Sceptic(), 0.0)
    assert max(int(r.kept.sum(1).max()) for r in records) == 1
    assert 0 < sum(beliefs.running_error.num_tokens) < learned
    records, _ = run("fixed:2", 1.0)  # a length that the user fixed is never exceeded
    assert max(int(r.kept.sum(1).max()) for r in records) == 2 and all(r.chosen is None for r in records)


def test_beliefs_are_told_chances_where_the_rule_knows_them(tmp_path: Path) -> None:
    target = random_target(tmp_path)

    def chances(rule: str, scheduler: str) -> list[torch.Tensor | None]:
        records: list[StepRecord] = []
        engine = Engine(target, Echo(), scheduler, rule=rule, observers=[records.append])  # type: ignore[list-item]
        engine.generate(PROMPTS, SamplingParams(max_tokens=20, seed=0))
        return [r.chances for r in records if r.kept is not None and r.kept.any()]

    told = chances("rejection", "lagged")
    assert told and all(c is not None and ((c >= 0) & (c <= 1) | c.isnan()).all() for c in told)
    assert any(c is not None and not c.isnan().all() for c in told)
    assert not any(c is not None for c in [*chances("coupled", "optimal"), *chances("rejection", "fixed:2")])


def test_what_one_rule_accepts_says_nothing_of_another(tmp_path: Path) -> None:
    target = random_target(tmp_path)
    live = [Engine(target, Echo(), rule=rule).beliefs for rule in ("coupled", "rejection", "coupled")]
    identities = [beliefs.identity for beliefs in live if isinstance(beliefs, LiveBeliefs)]
    assert identities[0] == identities[2] != identities[1]
