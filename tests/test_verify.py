"""Both acceptance rules commit tokens with the target's law: every branch enumerated, joint law of the first tokens.

The mutants at the end show that the harness can fail.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import dspark.verify
from dspark.errors import InvalidConfiguration
from dspark.sampling import Draws, KeyedDraws, law
from dspark.types import Draft, Load, Request, SamplingParams, Verdict
from dspark.verify import Coupled, Rejection, make_rule
from tests.enumeration import (
    CHAIN,
    TREE,
    Table,
    TableDrafter,
    decode_law,
    distance,
    law_of,
    logits_of,
    random_table,
    softmax,
    step,
    target_law,
)

EXACT, BIASED = 1e-12, 1e-3
RULES = pytest.mark.parametrize("rule", [Coupled, Rejection])


class Fixed:
    """Draft tokens down to this depth."""

    anticipates = False

    def __init__(self, depth: int) -> None:
        self.depth = depth

    def choose(self, draft: Draft, survival: Tensor, load: Load) -> Tensor:
        return draft.real & (draft.depth <= self.depth)


class Threshold(Fixed):
    """The draft as long as its confidence stays above one half."""

    def __init__(self) -> None:
        pass

    def choose(self, draft: Draft, survival: Tensor, load: Load) -> Tensor:
        return draft.real & (draft.confidence > 0.5).cumprod(-1).bool()


class Search(Fixed):
    """Chains by descending survival; `early_stop` at the first drop of tokens per second (Algorithm 1), or a search
    of them all. steps_per_second by the number of draft tokens read."""

    def __init__(self, steps_per_second: tuple[float, ...], early_stop: bool) -> None:
        self.steps_per_second, self.early_stop, self.anticipates = steps_per_second, early_stop, not early_stop

    def choose(self, draft: Draft, survival: Tensor, load: Load) -> Tensor:
        survival = draft.confidence.double().cumprod(-1)
        order = survival.flatten().sort(descending=True, stable=True).indices.tolist()
        keep = torch.zeros(survival.numel(), dtype=torch.bool)
        best, best_rate, tau = keep.clone(), load.base_tokens * self.steps_per_second[0], float(load.base_tokens)
        for count, index in enumerate(order, 1):
            keep[index] = True
            tau += float(survival.flatten()[index])
            rate = tau * self.steps_per_second[min(count, len(self.steps_per_second) - 1)]
            if rate > best_rate:
                best, best_rate = keep.clone(), rate
            elif self.early_stop:
                break
        return best.view_as(survival)


def table_of(*probabilities: float) -> Table:
    """The same law after every prefix."""
    return lambda prefix: logits_of(probabilities)


def reflected(tokens: tuple[int, ...]) -> float:
    """A number in (0, 1) that depends on all the tokens."""
    return sum((token + 1) * 0.37 * (i + 1) for i, token in enumerate(tokens)) % 1.0


def own_token(table: Table) -> Callable[[tuple[int, ...], int], float]:
    """The score that must not be used: how likely the drafted token itself was."""
    return lambda tokens, token: softmax(table(tokens), 1.0)[token]


LAWS = {
    "random 1": (random_table(1), random_table(2)),
    "random 2": (random_table(3, sharpness=0.4), random_table(4, sharpness=0.4)),
    "zeros in both": (random_table(5, num_zeros=1), random_table(6, num_zeros=1)),
    "zeros in the draft": (random_table(7), random_table(8, num_zeros=2)),
    "equal": (random_table(9), random_table(9)),
    "nothing shared": (table_of(0.5, 0.5, 0.0), table_of(0.0, 0.0, 1.0)),
    "draft is certain": (table_of(0.2, 0.5, 0.3), table_of(0.0, 1.0, 0.0)),
}


def deviation(
    rule, target: Table, draft: TableDrafter, scheduler=None, params=None, num_requests=1, **options
) -> float:
    num_tokens = options.pop("num_tokens", 3)
    scheduler = scheduler or Fixed(2)
    found = decode_law(rule, draft, scheduler, target, num_tokens, params, num_requests, **options)
    assert abs(sum(found.values()) - 1) < EXACT
    return distance(found, target_law(target, num_tokens, params, num_requests))


@RULES
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("name", LAWS)
def test_chains_follow_the_target(rule, name: str, temperature: float) -> None:
    target, draft = LAWS[name]
    assert deviation(rule, target, TableDrafter(draft), params=SamplingParams(temperature=temperature)) < EXACT


@RULES
def test_longer_chains_follow_the_target(rule) -> None:
    drafter = TableDrafter(random_table(12), (-1, 0, 1))
    assert deviation(rule, random_table(11), drafter, Fixed(3), num_tokens=4 if rule is Rejection else 3) < EXACT


@RULES
def test_rounds_do_not_depend_on_each_other_through_the_noise(rule) -> None:
    drafter = TableDrafter(random_table(14, 2))  # of two tokens: four rounds of three would take minutes
    assert deviation(rule, random_table(13, 2), drafter, num_tokens=4, loop=True) < EXACT


@RULES
def test_requests_side_by_side(rule) -> None:
    drafter = TableDrafter(random_table(16), (-1,))
    assert deviation(rule, random_table(15), drafter, Fixed(1), num_requests=2, num_tokens=2) < EXACT


@pytest.mark.parametrize("name", LAWS)
def test_coupled_trees_with_any_children(name: str) -> None:
    target, table = LAWS[name]
    drafter = TableDrafter(table, TREE, lambda logits, ordinal: (max(range(3), key=logits.__getitem__) + ordinal) % 3)
    assert deviation(Coupled, target, drafter) < EXACT
    drawn_first = TableDrafter(table, (-1, 0), lambda logits, ordinal: None)
    assert deviation(Coupled, target, drawn_first) < EXACT


def test_coupled_children_drawn_first_round_after_round() -> None:
    drafter = TableDrafter(random_table(14, 2), (-1, 0), lambda logits, ordinal: None)
    assert deviation(Coupled, random_table(13, 2), drafter, num_tokens=4, loop=True) < EXACT


@pytest.mark.parametrize("name", LAWS)
def test_rejection_trees_with_independent_siblings(name: str) -> None:
    target, table = LAWS[name]
    assert deviation(Rejection, target, TableDrafter(table, (-1, -1, 0)), keyed=False) < EXACT
    assert deviation(Rejection, target, TableDrafter(table, (-1, -1, -1)), num_tokens=2, keyed=False) < EXACT


def test_rejection_binary_tree_with_independent_siblings() -> None:
    drafter = TableDrafter(random_table(17, 2), TREE)
    assert deviation(Rejection, random_table(18, 2), drafter, num_tokens=2, keyed=False) < EXACT


@RULES
@pytest.mark.parametrize("pick", [lambda _, ordinal: ordinal, lambda _, ordinal: 1, lambda _, ordinal: 2 - ordinal])
@pytest.mark.parametrize("name", LAWS)
def test_trees_of_tokens_picked_outright_duplicates_among_them(rule, name: str, pick) -> None:
    target, table = LAWS[name]
    if rule is Rejection or name != "equal":
        assert deviation(rule, target, TableDrafter(table, TREE, pick)) < EXACT


CUTS = [
    SamplingParams(temperature=0.7, top_k=2),
    SamplingParams(top_p=0.8),
    SamplingParams(temperature=1.5, min_p=0.3),
    SamplingParams(temperature=0.5, top_k=2, top_p=0.9, min_p=0.1, logit_bias={1: 0.5}),
]
PENALTIES = [
    SamplingParams(frequency_penalty=0.5),
    SamplingParams(presence_penalty=-0.75, temperature=0.7),
    SamplingParams(repetition_penalty=2.0),
    SamplingParams(repetition_penalty=0.5, frequency_penalty=0.25, presence_penalty=0.5, top_k=2, logit_bias={0: 1.0}),
]


@RULES
@pytest.mark.parametrize("shape", [CHAIN, TREE])
@pytest.mark.parametrize("params", [*CUTS, *PENALTIES], ids=str)
def test_the_law_is_the_shaped_one(rule, shape: tuple[int, ...], params: SamplingParams) -> None:
    pick = (lambda _, ordinal: ordinal) if shape is TREE else (lambda _, ordinal: None)
    assert deviation(rule, random_table(21), TableDrafter(random_table(22), shape, pick), params=params) < EXACT


def test_a_draft_need_not_be_shaped_like_the_target() -> None:
    """Masking the target alone costs acceptance, not exactness: drafts drawn by another law that is told truly."""
    plain = Request(0, [0], SamplingParams(), 1)

    class Unshaped(Rejection):
        def draft(self, logits: Tensor, requests, previous):
            return super().draft(logits, [plain] * len(requests), previous)

    assert deviation(Unshaped, random_table(23), TableDrafter(random_table(24)), params=CUTS[0]) < EXACT


# Schedulers


SPS = (1.0, 0.5, 0.45)  # appendix A: reading one draft token costs much, a second one little


def scored(confidence) -> TableDrafter:
    return TableDrafter(random_table(32), confidence=confidence)


@RULES
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_fixed_lengths(rule, depth: int) -> None:
    assert deviation(rule, random_table(31), scored(None), Fixed(depth)) < EXACT


@RULES
@pytest.mark.parametrize(
    "scheduler", [Threshold(), Search(SPS, early_stop=True), Search((1, 0.8, 0.7), early_stop=True)]
)
def test_confidence_of_the_tokens_before(rule, scheduler) -> None:
    drafter = scored(lambda tokens, token: reflected(tokens))
    assert deviation(rule, random_table(31), drafter, scheduler) < EXACT


@RULES
def test_a_budget_shared_by_requests(rule) -> None:
    drafter = TableDrafter(random_table(34, 2), confidence=lambda tokens, token: reflected(tokens))
    scheduler = Search((1, 0.8, 0.7, 0.55, 0.5), early_stop=True)
    assert deviation(rule, random_table(33, 2), drafter, scheduler, num_requests=2, num_tokens=2) < EXACT


def test_own_token_scores_bias_rejection_and_not_coupled() -> None:
    drafter = scored(own_token(random_table(32)))
    assert deviation(Rejection, random_table(31), drafter, Threshold()) > BIASED
    assert deviation(Coupled, random_table(31), drafter, Threshold(), loop=True) < EXACT


def appendix_a(rule, early_stop: bool) -> float:
    """Probability that the first token is A."""
    second = lambda tokens, token: 0.8 if len(tokens) == 1 else [0.9, 0.0][tokens[-1]]  # noqa: E731
    drafter = TableDrafter(lambda prefix: (0.0, 0.0), confidence=second)
    target = lambda prefix: (float(torch.tensor(0.7).log()), float(torch.tensor(0.3).log()))  # noqa: E731
    found = decode_law(rule, drafter, Search(SPS, early_stop), target, 1)
    return found[((0,),)]


def test_appendix_a() -> None:
    assert appendix_a(Rejection, early_stop=True) == pytest.approx(0.70, abs=1e-6)
    assert appendix_a(Rejection, early_stop=False) == pytest.approx(0.85, abs=1e-6)
    assert appendix_a(Coupled, early_stop=True) == pytest.approx(0.70, abs=1e-6)
    assert appendix_a(Coupled, early_stop=False) == pytest.approx(0.70, abs=1e-6)


def second_token_law(rule) -> dict:
    """Two rounds; the second verifies iff the *first* round drafted token 0 for the same place (history only)."""
    target, drafter = table_of(0.7, 0.3), TableDrafter(table_of(0.5, 0.5))

    def decode(draws: Draws) -> int:
        seen: list[int] = []

        class Remembers(Fixed):
            def choose(self, draft: Draft, survival: Tensor, load: Load) -> Tensor:
                seen.append(int(draft.tokens[0, 1]))
                depth = 0 if len(seen) == 1 else 1 - seen[0]
                return draft.depth <= depth

        request, scheduler = Request(0, [0], SamplingParams(), 1, seed=5), Remembers(0)
        for _ in range(2):
            request.tokens += step([request], drafter, scheduler, rule(draws), target)[0]
        return request.tokens[2]

    return law_of(decode)


def test_a_scheduler_may_go_by_what_earlier_rounds_drafted() -> None:
    """A place is drafted again after a rejection before it: with the same noise, history would know the new token."""
    exact = dict(enumerate(softmax(logits_of((0.7, 0.3)), 1.0)))
    assert distance(second_token_law(Rejection), exact) < EXACT
    assert distance(second_token_law(Coupled), exact) < EXACT

    class SameNoise(Rejection):
        def draft(self, logits: Tensor, requests, previous):
            scores, temperature = dspark.verify.shape_logits(logits, requests, previous)
            positions = [len(r.tokens) + len(p) for r, p in zip(requests, previous, strict=True)]
            tokens = self.draws.tokens(scores, temperature, [r.seed for r in requests], positions, 1)
            return tokens, law(scores.double(), temperature.double())

    assert distance(second_token_law(SameNoise), exact) > BIASED


# Mutants: rules with one mistake, every one of them must be seen


def mutant(rule: type, method: str, right: str, wrong: str) -> type:
    """The rule with one piece of its source replaced."""
    source = textwrap.dedent(inspect.getsource(getattr(rule, method)))
    assert source.count(right) == 1, f"{method} has no longer one {right!r}: bring the mutant up to date"
    scope = dict(vars(dspark.verify))
    exec(source.replace(right, wrong), scope)
    return type("Mutant", (rule,), {method: scope[method]})


RESIDUAL = "residual = (p - q).clamp_min(0)"
SIBLINGS = (-1, -1)
BONUS = "one = torch.ones("
RATIO = "float(p[token] / q[token]) if ordinal else ratios[child]"
MUTANTS = {
    "residual is p": (mutant(Rejection, "_walk", RESIDUAL, "residual = p"), {}),
    "residual without clamp": (mutant(Rejection, "_walk", RESIDUAL, "residual = (p - q).abs()"), {}),
    "p and q swapped": (mutant(Rejection, "_walk", RATIO, "min(1.0, float(q[token] / p[token]))"), {}),
    "always accepted": (mutant(Rejection, "_walk", RATIO, "1.0"), {}),
    "siblings judged as if each were the first": (
        mutant(Rejection, "_walk", RATIO, "ratios[child]"),
        {"drafter": TableDrafter(random_table(42), SIBLINGS), "keyed": False},
    ),
    "bonus from the residual": (
        mutant(
            Rejection, "_walk", BONUS, f"p = (p - draft_law[node]).clamp_min(0) if path and node == 1 else p; {BONUS}"
        ),
        {},
    ),
    "residual not renormalised": (
        mutant(Rejection, "_walk", "torch.where(mass > 0, residual / mass, p)", "residual"),
        {"drafter": TableDrafter(random_table(42), SIBLINGS), "keyed": False},
    ),
    "q before the cut": (
        mutant(
            Rejection,
            "draft",
            "law(scores.double(), temperature.double())",
            "law(logits.double(), temperature.double())",
        ),
        {"params": SamplingParams(top_k=2)},
    ),
    "q before the temperature": (
        mutant(Rejection, "draft", "law(scores.double(), temperature.double())", "scores.double().softmax(-1)"),
        {"params": SamplingParams(temperature=0.5)},
    ),
    "target before the temperature": (
        mutant(Rejection, "verify", "law(scores.double(), temperature.double())", "rows.double().softmax(-1)"),
        {"params": SamplingParams(temperature=0.5)},
    ),
    "penalties forget the drafted path": (
        mutant(Rejection, "verify", "tree.paths)", "[[] for _ in tree.paths])"),
        {"params": SamplingParams(frequency_penalty=1.0)},
    ),
    "coupled penalties forget the drafted path": (
        mutant(
            Coupled,
            "_committed",
            "shape_logits(logits, owners, previous)",
            "shape_logits(logits, owners, [[] for _ in owners])",
        ),
        {"params": SamplingParams(frequency_penalty=1.0)},
    ),
    "one noise for drafting and residual": (
        mutant(
            Rejection,
            "_walk",
            "[request.seed], [position], RESIDUAL",
            "[request.seed ^ len(request.tokens) << 32], [len(path)], DRAFT",
        ),
        {},
    ),
    "one noise for acceptance and residual": (mutant(Rejection, "_walk", "RESIDUAL", "ACCEPT"), {}),
    "siblings share one noise": (Rejection, {"drafter": TableDrafter(random_table(42), SIBLINGS)}),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_seen(name: str) -> None:
    rule, options = MUTANTS[name]
    options = {"drafter": TableDrafter(random_table(42)), **options}
    assert deviation(rule, random_table(41), options.pop("drafter"), **options) > BIASED


@pytest.mark.parametrize("name", MUTANTS)
def test_their_originals_pass(name: str) -> None:
    """The same cases, the mistake taken out."""
    rule, options = MUTANTS[name]
    options = {"drafter": TableDrafter(random_table(42)), **options}
    if name == "siblings share one noise":
        options["keyed"] = False
    original = rule if rule in (Coupled, Rejection) else rule.__mro__[1]
    assert deviation(original, random_table(41), options.pop("drafter"), **options) < EXACT


# The rest of the contract


@RULES
def test_empty_drafts_and_nothing_kept(rule) -> None:
    requests = [Request(b, [b], SamplingParams(temperature=0), 1) for b in range(2)]
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    verdict = rule(KeyedDraws(3)).verify(Draft.empty(2), torch.zeros(2, 0, dtype=torch.bool), logits, requests)
    assert verdict.next_tokens.tolist() == [1, 0]
    assert verdict.accepted.shape == (2, 0)


@RULES
def test_a_kept_token_needs_its_parent(rule) -> None:
    draft = Draft(torch.zeros(1, 2, dtype=torch.long), torch.tensor([2]))
    with pytest.raises(AssertionError, match="parent is not kept"):
        rule(KeyedDraws(3)).verify(
            draft, torch.tensor([[False, True]]), torch.zeros(2, 3), [Request(0, [0], SamplingParams(), 1)]
        )


def test_rules_by_name() -> None:
    draws = KeyedDraws(3)
    assert isinstance(make_rule("coupled", draws), Coupled)
    assert isinstance(make_rule("rejection", draws), Rejection)
    with pytest.raises(InvalidConfiguration, match="coupled, rejection"):
        make_rule("typo", draws)


@pytest.mark.parametrize("draws_outright", [False, True])
def test_chances_are_how_often_each_token_is_accepted_once_it_is_reached(draws_outright: bool) -> None:
    """Every draft token that the draft's law allows, every branch of the rule: two positions of a chain, and the end."""
    p, q = (torch.rand(3, 4, generator=torch.Generator().manual_seed(s), dtype=torch.double) for s in (0, 1))
    logits, laws, keep = p.log().float(), (q / q.sum(1, keepdim=True))[None, :2], torch.tensor([[True, True]])
    request, p = Request(0, [1, 2], SamplingParams(seed=3), num_prompt_tokens=1), (p.log().float().double()).softmax(1)

    def judge(draws: Draws, tokens: list[int], reports_chances: bool = True) -> Verdict:
        rule = Rejection(draws)
        rule.reports_chances = reports_chances
        draft = Draft(torch.tensor([tokens]), torch.tensor([2]), probs=None if draws_outright else laws)
        return rule.verify(draft, keep, logits, [request])

    reached, accepted = torch.zeros(2), torch.zeros(2)
    first = [2] if draws_outright else range(4)
    for tokens in ([x, y] for x in first for y in ([1] if draws_outright else range(4))):
        weight = 1.0 if draws_outright else float(laws[0, 0, tokens[0]] * laws[0, 1, tokens[1]])
        for outcome, probability in law_of(lambda draws, t=tokens: tuple(judge(draws, t).accepted[0].tolist())).items():
            reached += weight * probability * torch.tensor([1.0, float(outcome[0])])
            accepted += weight * probability * torch.tensor(outcome)
    told = judge(KeyedDraws(4), [2, 1])
    expected = p[[0, 1], [2, 1]] if draws_outright else torch.minimum(p[:2], laws[0]).sum(1)
    assert torch.allclose(accepted / reached, expected.float(), atol=1e-6)
    num_reached = min(2, int(told.accepted.sum()) + 1)
    assert torch.allclose(told.chances[0, :num_reached], expected[:num_reached])
    assert told.chances[0, num_reached:].isnan().all()
    assert judge(KeyedDraws(4), [2, 1], reports_chances=False).chances is None
