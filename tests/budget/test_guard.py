"""The guard over a made-up machine and traffic: when it stops, whom it leaves out, and how it comes back."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from dspark.budget.capacity import Capacity
from dspark.budget.fares import Fares, Stage
from dspark.budget.guard import Guard, GuardSettings, _Agreement
from dspark.budget.throughput import Optimal
from dspark.types import Draft, Load, StepRecord


class Machine(Capacity):
    """Seconds by formula, known from the start."""

    is_known = True
    speed = 1.0  # seconds are multiplied by it, unknown to who asks what steps cost
    per_unread = 0.0  # seconds of the drafter for each position of a prompt

    def __init__(self, per_token: float, per_draft: float, base: float = 1.0) -> None:
        super().__init__()
        self.per_token, self.per_draft, self.base = per_token, per_draft, base

    def seconds(self, tokens, requests, context_tokens, is_reading=False):
        return self.base + self.per_token * np.asarray(tokens)

    def draft_seconds(self, requests, context_tokens):
        return 0.2 + self.per_draft * requests if requests else 0.0


class Traffic:
    """Requests with an acceptance of their own, decoded by guard and scheduler as the engine does; counts seconds."""

    def __init__(
        self,
        machine: Machine,
        acceptance: list[float],
        believed: float | None = None,
        noise: float = 0.0,
        seed: int = 0,
        capacity: Capacity | None = None,
    ) -> None:
        self.noise, self.capacity = noise, machine if capacity is None else capacity
        self.machine, self.acceptance, self.believed = machine, torch.tensor(acceptance), believed
        self.guard, self.scheduler = Guard(self.capacity), Optimal(self.capacity)
        self.random = torch.Generator().manual_seed(seed)
        self.tokens = self.seconds = 0.0
        self.drafted: list[list[int]] = []
        self.prompt_tokens, self.unread = 0, 0  # read by the target in every tenth step; not yet read by the drafter

    def step(self) -> None:
        n = len(self.acceptance)
        prompt_tokens = self.prompt_tokens if len(self.drafted) % 10 == 0 else 0
        self.unread += prompt_tokens
        load = Load(n + prompt_tokens, n, 100 * n, 0.0, prompt_tokens)
        rows = self.guard.choose(list(range(n)), load)
        sizes = torch.zeros(n, dtype=torch.long)
        sizes[rows] = 7
        draft = Draft(torch.zeros(n, 7, dtype=torch.long), sizes)
        believed = self.acceptance if self.believed is None else torch.full((n,), self.believed)
        if self.noise:
            believed = (believed + self.noise * torch.randn(n, generator=self.random)).clamp(0.01, 0.99)
        survival = believed[:, None].expand(n, 7).cumprod(1) * draft.real
        draft_seconds, unread = self.machine.draft_seconds(len(rows), 100), 0
        if rows:
            unread, self.unread = self.unread, 0
            draft_seconds += self.machine.per_unread * unread
        load = replace(load, draft_seconds=self.capacity.draft_seconds(len(rows), 100) or draft_seconds)
        keep = self.scheduler.choose(draft, survival, load) if rows else draft.real
        luck = torch.rand(n, 7, generator=self.random) < self.acceptance[:, None]
        accepted = keep & luck.cumprod(1).bool()
        record = StepRecord(
            request_ids=list(range(n)),
            drafted=sizes.tolist(),
            verified=keep.sum(1).tolist(),
            accepted=accepted.sum(1).tolist(),
            survival=survival if rows else None,
            kept=keep,
            accepted_nodes=accepted,
            load=load,
            num_asked=len(rows),
            num_unread=unread,
            num_tokens=n + int(keep.sum()),
            num_prompt_tokens=prompt_tokens,
            predicted_accepted=float((survival * keep).sum()),
        )
        seconds = float(self.machine.seconds(record.num_tokens, n, 0))
        record.seconds = {"draft": draft_seconds * self.machine.speed, "target": seconds * self.machine.speed}
        if self.capacity is not self.machine:
            self.capacity.observe(record)
        self.guard.observe(record)
        self.drafted.append(rows)
        self.tokens += n + int(accepted.sum())
        self.seconds += seconds + draft_seconds

    def run(self, steps: int) -> float:
        """Tokens per second over so many steps."""
        tokens, seconds = self.tokens, self.seconds
        for _ in range(steps):
            self.step()
        return (self.tokens - tokens) / (self.seconds - seconds)

    @property
    def plain(self) -> float:
        n = len(self.acceptance)
        return n / float(self.machine.seconds(n, n, 0))


def test_it_drafts_where_drafts_pay():
    traffic = Traffic(Machine(per_token=0.02, per_draft=0.02), [0.8] * 4)
    assert traffic.run(300) > 1.5 * traffic.plain
    assert sum(len(rows) == 4 for rows in traffic.drafted) > 280  # all but the plain steps it compares with


def test_reading_a_prompt_is_no_plain_step_to_compare_with():
    """One short text after the other: a step that only reads must not put off the plain one that is due."""
    traffic = Traffic(Machine(per_token=0.02, per_draft=0.7), [0.8])
    reading = StepRecord(load=Load(50, 1, 0, 0.0, 50), num_tokens=50, num_prompt_tokens=50, seconds={"target": 2.0})
    for _ in range(60):
        traffic.run(8)
        traffic.guard.observe(reading)
    assert sum(not rows for rows in traffic.drafted[24:]) >= 16


@pytest.mark.parametrize("num_requests", [1, 8, 32])
def test_it_is_not_slower_than_plain_decoding_where_they_do_not(num_requests):
    traffic = Traffic(Machine(per_token=1.0, per_draft=0.3, base=0.2), [0.4] * num_requests)
    traffic.run(100)
    assert traffic.run(2000) > 0.99 * traffic.plain
    assert any(traffic.drafted[100:])  # it still looks from time to time


def test_requests_like_those_that_were_refused_are_not_thought_about(monkeypatch):
    """Most steps where drafts do not pay have somebody new, and others of whom somebody has ended."""
    traffic = Traffic(Machine(per_token=1.0, per_draft=0.3, base=0.2), [0.4] * 8)
    traffic.run(100)
    guard, thought = traffic.guard, []
    monkeypatch.setattr(guard, "_rows", lambda ids, load: thought.append(load) or [])
    assert not guard.is_drafting
    for n in range(20):
        assert guard.choose([100 + n, *range(1, 8)], Load(8, 8, 800)) == [] and guard.reason == "cost"
    assert not thought
    guard.choose(list(range(8)), Load(8, 8, 800), ["another kind"] * 8)
    guard.choose(list(range(2)), Load(2, 2, 200))  # what so few cost is another question
    assert len(thought) == 2


def test_where_drafts_clearly_pay_a_new_request_is_decided_about_with_others(monkeypatch):
    """One short request after the other, of a kind that is known, with little before it."""
    traffic = Traffic(Machine(per_token=0.05, per_draft=0.1), [0.8])
    traffic.run(300)
    guard, decided = traffic.guard, []
    monkeypatch.setattr(guard, "_decide", lambda ids, load: decided.append(ids))

    def come(request_id: int, context: int, *kinds: str) -> None:
        for _ in range(2):  # one may be plain, to compare with
            guard.choose([request_id], Load(1, 1, context), kinds)

    for n in range(10):
        come(100 + n, 100)
    assert not decided
    come(200, 5000)  # much to read for the drafter
    come(300, 100, "another kind")
    assert {*map(tuple, decided)} == {(200,), (300,)}


def test_no_drafter_is_judged_by_a_few_tokens():
    """However little the first drafts are worth, and although not one of their tokens is."""
    traffic = Traffic(Machine(per_token=1.0, per_draft=1.0, base=0.1), [0.3])
    traffic.run(40)
    assert traffic.drafted[:24] == [[0]] * 24
    assert not any(traffic.drafted[24:])


def test_it_recovers_when_traffic_becomes_easy():
    traffic = Traffic(Machine(per_token=0.1, per_draft=0.1), [0.15] * 8)
    traffic.run(300)
    assert not any(len(rows) == 8 for rows in traffic.drafted[200:])
    traffic.acceptance = torch.full((8,), 0.9)
    traffic.run(400)
    assert sum(len(rows) == 8 for rows in traffic.drafted[-100:]) > 90
    assert traffic.run(200) > 1.15 * traffic.plain


def test_it_goes_by_what_was_accepted_not_by_what_was_promised():
    traffic = Traffic(Machine(per_token=0.1, per_draft=0.2), [0.1] * 4, believed=0.8)
    traffic.run(200)
    assert traffic.guard.fares.trust() < 0.5
    assert traffic.run(1000) > 0.99 * traffic.plain


def test_hard_requests_are_left_out():
    traffic = Traffic(Machine(per_token=0.03, per_draft=0.25), [0.9, 0.9, 0.05, 0.05])
    traffic.run(200)
    late = traffic.drafted[100:]
    easy, hard = (sum(r in rows for rows in late) for r in (0, 2))
    assert easy > 95 and hard < 15
    assert traffic.guard.reason == "difficulty"


def test_a_drafter_that_costs_next_to_nothing_is_asked_about_all_or_nobody():
    """Nothing is spared by leaving out the hard ones; what is verified of their drafts the scheduler decides."""

    class Cheap(Machine):
        def draft_seconds(self, requests, context_tokens):
            return 0.025 * requests

    traffic = Traffic(Cheap(per_token=0.1, per_draft=0.0), [0.9] * 4 + [0.05] * 4)
    traffic.run(200)
    assert {len(rows) for rows in traffic.drafted} == {0, 8}
    assert sum(len(rows) == 8 for rows in traffic.drafted) > 150


def test_decisions_wait_for_drafts_where_few_are_found():
    guard, decided = Guard(Machine(per_token=0.02, per_draft=0.02)), []
    guard._num_judged, guard._decide_after, guard._decided_for = 24, 16, 0
    guard._decide = lambda ids, load: decided.append(guard._now)
    guard._needs_plain_step = lambda load: False
    guard._decided_about, guard._paying_stages = {0}, {Stage(0)}
    for _ in range(64):
        guard.choose([0], Load(1, 1, 100))
        guard.observe(StepRecord([0], [0], [0], [0], num_asked=1))
    assert decided == [64]


@pytest.mark.parametrize("prompt_tokens", [0, 500])
def test_prompts_that_the_drafter_reads_are_part_of_what_it_costs(prompt_tokens):
    """Drafts pay, but not where as much time again goes into reading prompts that plain decoding leaves unread."""
    traffic = Traffic(Machine(per_token=0.05, per_draft=0.1), [0.7] * 4)
    traffic.machine.per_unread, traffic.prompt_tokens = 0.05, prompt_tokens
    traffic.run(200)
    speed = traffic.run(1500) / traffic.plain
    assert speed > 0.99 if prompt_tokens else speed > 1.2


def test_requests_that_come_and_go_do_not_have_everything_decided_anew():
    """A request that reads its prompt leaves one less to draft for, for a step: what was decided for all still holds."""
    guard = Guard(Machine(per_token=1.0, per_draft=1.0))
    guard._num_judged, guard.is_drafting, guard._probe_spacing, guard._now = 24, False, np.inf, 9
    decided = []
    guard._decide = lambda ids, load: decided.append(len(ids))
    guard.choose([0, 1, 2, 3], Load(4, 4, 400))
    for _ in range(20):
        guard.choose([0, 1, 2], Load(83, 4, 300, 0.0, 80))
        guard.choose([0, 1, 2, 3], Load(4, 4, 400))
    assert decided == [4]


def test_while_it_is_off_hardly_anything_is_decided():
    """Texts of two kinds come and go, a new one every twentieth step: what was decided for their like holds for them."""
    guard, decided = Guard(Machine(per_token=1.0, per_draft=1.0)), []
    guard._num_judged, guard.is_drafting = 24, False
    decide, guard._decide = guard._decide, lambda ids, load: (decided.append(guard._now), decide(ids, load))
    asked = [guard.choose([now // 20], Load(1, 1, 100), [now // 20 % 2]) for now in range(2000)]
    assert guard.reason == "cost" and 0 < sum(map(len, asked)) < 20
    assert len(decided) < 6 + 3 * sum(map(len, asked))


def test_what_was_decided_for_a_text_holds_for_the_next_one_like_it():
    """Short texts behind short prompts, which drafts pay for, take turns with such behind long ones."""
    guard, decided, asked = Guard(Machine(per_token=1.0, per_draft=1.0)), [], []

    def decide(ids, load):
        decided.append(load.context_tokens)
        guard.is_drafting, guard._decided_at, guard._probe_spacing = load.context_tokens < 256, guard._now, math.inf
        guard._paying_stages, guard._decide_after = {*guard._stages.values()}, 1000

    guard._num_judged, guard._decide = 24, decide
    guard._needs_plain_step = guard._may_be_easy = lambda _: False
    for now in range(200):
        num_prompt = 2000 if now // 5 % 2 else 20
        asked.append(bool(guard.choose([now // 5], Load(1, 1, num_prompt), ["chat"], [now % 5], [num_prompt])))
    assert decided == [20, 2000] and asked == ([True] * 5 + [False] * 5) * 20


def test_while_it_is_too_soon_to_decide_an_old_agreement_is_better_than_none():
    guard, told = Guard(Machine(per_token=1.0, per_draft=1.0)), ([0], [20])
    guard._num_judged, guard.is_drafting, guard._now, guard._decides_from = 24, False, 600, 700
    stage = Stage.of("chat", 0, 20)
    guard._agreed[guard._mix([7], Load(1, 1, 20), [stage])] = _Agreement(512, 1.5, 2.0, 2.0, {stage})
    guard._needs_plain_step = lambda load: False
    assert guard.choose([8], Load(1, 1, 20), ["code"], *told) == []
    assert guard.choose([7], Load(1, 1, 20), ["chat"], *told) == [0]


def test_texts_behind_long_prompts_are_judged_by_their_like():
    fares = Fares(num_remembered=24, memory=200)
    for n in range(60):
        for num_prompt, promise in ((100, 0.6), (1300, 0.05)):
            fares._remember(n, n, Stage.of("chat", 4, num_prompt), [promise] * 6)
    short, long, longer = (fares.expected(Stage.of("chat", 4, n)) for n in (200, 2000, 5000))
    assert short > 3.2 and long < 0.6  # promised were 3.6 and 0.3
    assert longer < 0.6  # of which nothing is known yet, but of their nearest neighbours


def test_while_it_is_off_new_requests_among_known_ones_are_no_new_question():
    guard, decided = Guard(Machine(per_token=1.0, per_draft=1.0)), []
    guard._num_judged, guard.is_drafting, guard._now = 24, False, 9
    decide, guard._decide = guard._decide, lambda ids, load: (decided.append(guard._now), decide(ids, load))
    for num_known in range(8, 3, -1):
        for request_id in range(10 * num_known, 11 * num_known):
            guard.fares._remember(guard._now, request_id, Stage(), np.full(7, 0.01))
        guard.choose([*range(10 * num_known, 10 * num_known + 8)], Load(8, 8, 800))
        guard.choose([*range(10 * num_known, 10 * num_known + 8)], Load(8, 8, 800))
    assert len(decided) == 1


def test_it_does_not_start_for_a_few_while_others_read_their_prompts():
    """Drafts pay for two requests and not for eight: two of eight that decode in a step are joined in the next."""
    guard = Guard(Machine(per_token=1.0, per_draft=0.1, base=4.0))
    guard._num_judged, guard.is_drafting, guard._last_probe, guard._now = 24, False, 9, 20
    for request_id in range(8):
        guard.fares._remember(20, request_id, Stage(), np.full(7, 0.7))
    assert guard.choose([0, 1], Load(482, 8, 200, 0.0, 480)) == [] and not guard.is_drafting
    assert guard.choose([*range(8)], Load(8, 8, 800)) == [] and not guard.is_drafting
    assert guard.choose([0, 1], Load(2, 2, 200)) == [0, 1]
    guard.is_drafting = False
    some = [guard.choose([0, 1], Load(482, 8, 200, 0.0, 480)) for _ in range(520)]
    assert not any(some[:500]) and any(some)  # some traffic always reads prompts


def test_a_probe_goes_on_while_others_read_their_prompts():
    guard = Guard(Machine(per_token=1.0, per_draft=0.1))
    guard._num_judged, guard.is_drafting, guard._last_probe, guard._now = 24, False, 9, 9
    load = Load(483, 8, 300, 0.0, 480)
    mix = guard._mix([0, 1, 5], load, [Stage(0)] * 3)
    guard._probed, guard._refused = {0, 1, 2}, {mix: None, "another": None}
    assert guard.choose([0, 1, 5], load) == [0, 1]
    assert [*guard._refused] == ["another"]  # decided again with what it shows


def test_plain_steps_that_lose_much_are_rare():
    traffic = Traffic(Machine(per_token=0.02, per_draft=0.02), [0.8] * 4)
    traffic.run(100)
    advantage = traffic.run(1400) / traffic.plain
    lost = (advantage - 1) * sum(not rows for rows in traffic.drafted[100:])
    assert advantage > 1.5 and 0 < lost < 0.004 * 1400 * traffic.guard._length  # in seconds of a plain step


def test_a_kind_that_was_never_drafted_for_is_trusted_as_the_others_are():
    traffic = Traffic(Machine(per_token=0.1, per_draft=0.2), [0.1] * 4, believed=0.8)
    traffic.run(200)
    assert traffic.guard.fares.trust("another") == pytest.approx(traffic.guard.fares.trust())


def test_luck_is_not_taken_for_ease():
    """All requests are alike and drafts hardly pay: who looked best last time is no better the next time."""
    traffic = Traffic(Machine(per_token=0.1, per_draft=0.2, base=20.0), [0.5] * 64, noise=0.2)
    traffic.run(100)
    assert traffic.run(300) > 0.993 * traffic.plain


def test_it_does_not_flicker():
    """Where drafts pay about as much as they cost, it stays with what it does."""
    machine = Machine(per_token=0.1, per_draft=0.1)
    traffic = Traffic(machine, [0.5] * 8)
    traffic.run(100)
    flips, before = 0, traffic.guard.is_drafting
    for _ in range(600):
        traffic.step()
        flips += traffic.guard.is_drafting != before
        before = traffic.guard.is_drafting
    assert flips <= 4


def test_a_machine_whose_speed_drifts_misleads_nobody():
    """Drafts cost what they give, nearly; speed wanders by a fifth and more while only drafted steps are seen, or plain."""
    shares = []
    for seed in range(4):
        rng, machine = np.random.default_rng(seed), Machine(per_token=0.12, per_draft=0.45, base=3.0)
        traffic = Traffic(machine, [0.6, 0.65, 0.7, 0.7, 0.7, 0.7, 0.75, 0.8], seed=seed, capacity=Capacity())
        drift = 0.0
        for _ in range(1500):
            drift = 0.997 * drift + rng.normal(0, 0.017)
            machine.speed = float(np.exp(drift) * rng.lognormal(0, 0.08)) * (3 if rng.random() < 0.01 else 1)
            traffic.step()
        shares.append(traffic.tokens / traffic.seconds / traffic.plain)
    assert np.mean(shares) > 0.97 and min(shares) > 0.95


@pytest.mark.parametrize(("believed_factor", "acceptance"), [(1.5, 0.7), (0.7, 0.78)])
def test_it_goes_by_what_steps_take_not_by_what_they_are_said_to_take(believed_factor, acceptance):
    """Plain steps are believed to take longer than they do, so that drafts seem to pay and do not; and the other way."""

    class Mistaken(Machine):
        def seconds(self, tokens, requests, context_tokens, is_reading=False):
            factor = np.where(np.asarray(tokens) > requests, 1, believed_factor)
            return factor * super().seconds(tokens, requests, context_tokens)

        def observe(self, record):
            pass

    true, believed = (kind(per_token=0.12, per_draft=0.45, base=3.0) for kind in (Machine, Mistaken))
    always = Traffic(true, [acceptance] * 8)
    always.guard.choose = lambda request_ids, load: list(range(8))
    pays = always.run(300) > always.plain
    assert pays == (believed_factor < 1)
    traffic = Traffic(true, [acceptance] * 8, capacity=believed)
    traffic.run(600)
    drafted = sum(len(rows) == 8 for rows in traffic.drafted[-200:])
    assert drafted > 150 if pays else drafted < 50


def test_a_few_slow_plain_steps_do_not_make_drafts_look_cheap_for_long():
    """Whoever finds that drafts pay seldom looks again, so the first look must not go by two disturbed steps."""

    class Known(Machine):
        def observe(self, record):
            pass

    class Disturbed(Machine):
        num_plain = 0

        def seconds(self, tokens, requests, context_tokens, is_reading=False):
            self.num_plain += np.ndim(tokens) == 0 and tokens == requests
            return super().seconds(tokens, requests, context_tokens) * (3 if 0 < self.num_plain <= 4 else 1)

    costs, num_drafted = {"per_token": 0.12, "per_draft": 1.2, "base": 1.0}, 0
    for seed in range(3):
        traffic = Traffic(Disturbed(**costs), [0.6], seed=seed, capacity=Known(**costs))
        traffic.run(400)
        num_drafted += sum(map(bool, traffic.drafted))
    assert num_drafted < 250


@pytest.mark.parametrize("leap", [7200.0, 1e-9])
def test_a_clock_that_leaps_is_not_believed(leap):
    """Even while little is known: what a step was said to take must not decide for long."""
    machine = Machine(per_token=0.02, per_draft=0.02)
    traffic = Traffic(machine, [0.8] * 4, capacity=Capacity())
    for step in range(400):
        machine.speed = leap if step in (0, 7, 20, 30, 60) else 1e-3
        traffic.step()
    assert sum(len(rows) == 4 for rows in traffic.drafted[-100:]) > 85


def test_beginnings_that_are_easy_promise_nothing_of_what_follows():
    """An average over whole texts would have it that drafts pay all along: 0.85 of the first 16 tokens are guessed, 0.3 after."""
    machine, texts = Machine(per_token=0.1, per_draft=0.5), [(lambda n: 0.85 if n < 16 else 0.3, None)] * 30
    speeds = [one_after_the_other(texts, machine, seed) for seed in range(3)]
    always = [one_after_the_other(texts, machine, seed, is_guarded=False) for seed in range(3)]
    assert np.mean(always) < 0.95 and np.mean(speeds) > 1.0


def test_what_drafts_promise_goes_by_the_age_of_the_text():
    fares = Fares(num_remembered=24, memory=200)
    for request_id in range(6):
        for num_generated, promise in ((1, 0.5), (40, 0.2)):
            for n in range(4):
                fares._remember(n, request_id, Stage.of("chat", num_generated), [promise] * 6)
    young, old, never_seen = (fares.expected(Stage.of("chat", n)) for n in (1, 40, 90))
    assert young > 2.7 and old < 1.5 and never_seen == pytest.approx(1.2)
    assert fares.expected(Stage.of("code", 40)) == pytest.approx(2.1, rel=0.2)  # as all
    for sample in fares.samples(9, [3, 99], [Stage.of("chat", 40)] * 2):
        assert all(0 < chance <= 1 for row in sample for chance in row)
    promised = np.array(fares.samples(9, [3, 99], [Stage.of("chat", 40)] * 2)).sum(2).mean(0)
    assert promised == pytest.approx([old, old], rel=0.1)


def test_stages_begin_where_the_one_before_ends():
    stages = [Stage.of("chat", n) for n in range(1000)]
    for before, after in pairwise(stages):
        assert after in (before, before.older)
        assert (after.begins == stages.index(after)) and (after.age > 0 or after.begins == 0)


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr("dspark.budget.fares._MOST_REQUESTS", 10)
    monkeypatch.setattr("dspark.budget.fares._MOST_STAGES", 20)
    fares = Fares(num_remembered=24, memory=200)
    for i in range(50):
        fares._remember(i, i, Stage(i), np.ones(7))
    assert len(fares._by_request) == 10 and len(fares._lately) <= 64 and len(fares._promises) <= 20


def one_after_the_other(
    texts: Sequence[tuple[float | Callable[[int], float], Hashable]],
    machine: Machine,
    seed: int,
    is_guarded: bool = True,
    finds: float = 1.0,
    prompts: Sequence[int] = (100,),
    seconds_of_deciding: float = 0.0,
    settings: GuardSettings | None = None,
) -> float:
    """Tokens per plain step's seconds. Each text is a request of 100 tokens with an acceptance, which may be a
    function of how many of them there are, and a kind of its own.

    finds    share of the drafts that have anything in them
    prompts  tokens of prompts that texts come behind, in turn
    """
    guard, scheduler, random = Guard(machine, settings), Optimal(machine), np.random.default_rng(seed)
    tokens = seconds = 0.0
    for request_id, (easiness, kind) in enumerate(texts):
        begin, end, num_prompt = tokens, tokens + 100, prompts[request_id % len(prompts)]
        unread, load = num_prompt, Load(1, 1, num_prompt)
        guard.observe(
            StepRecord(load=Load(unread, 1, 0, 0.0, unread), num_prompt_tokens=unread, seconds={"target": 1.0})
        )
        while tokens < end:
            num_generated = int(tokens - begin) + 1
            acceptance = easiness(num_generated) if callable(easiness) else easiness
            told = [kind], [num_generated], [num_prompt]
            asked = guard.choose([request_id], load, *told) if is_guarded else [0]
            drafting = machine.draft_seconds(len(asked), 100)
            drafting += seconds_of_deciding * (guard._decided_at == guard._now)
            record = StepRecord([request_id], [0], [0], [0], load=replace(load, draft_seconds=drafting), num_tokens=1)
            if asked:
                record.num_asked, record.num_unread = 1, unread
                drafting, unread = drafting + machine.per_unread * unread, 0
            if asked and random.random() < finds:
                draft = Draft(torch.zeros(1, 7, dtype=torch.long), torch.tensor([7]))
                survival = torch.full((1, 7), acceptance).cumprod(1)
                keep = scheduler.choose(draft, survival, record.load)
                accepted = keep & torch.from_numpy(random.random((1, 7)) < acceptance).cumprod(1).bool()
                record.survival, record.kept, record.accepted_nodes = survival, keep, accepted
                record.drafted, record.verified, record.accepted = [7], [int(keep.sum())], [int(accepted.sum())]
                record.num_tokens, record.predicted_accepted = 1 + int(keep.sum()), float((survival * keep).sum())
            target = float(machine.seconds(record.num_tokens, 1, 0)) * random.lognormal(0, 0.1)
            record.seconds = {"draft": drafting, "target": target}
            guard.observe(record)
            tokens, seconds = tokens + 1 + record.accepted[0], seconds + drafting + target
    return tokens / seconds * float(machine.seconds(1, 1, 0))


def test_deciding_to_stay_off_takes_a_small_share_of_the_time():
    """A decision takes as long as three plain steps here, and every text is another question."""
    machine, texts = Machine(per_token=0.3, per_draft=2.0), [(0.3, kind) for kind in range(40)]
    bounded, unbounded = (
        one_after_the_other(texts, machine, 0, seconds_of_deciding=4.0, settings=GuardSettings(decide_share=share))
        for share in (0.005, math.inf)
    )
    assert bounded > 0.97 and bounded > 1.02 * unbounded


def test_a_decision_is_not_timed_by_a_clock_that_stands_still():
    guard = Guard(Machine(per_token=1.0, per_draft=5.0))
    guard._num_judged = 24
    for _ in range(3):
        guard.choose([0], Load(1, 1, 100))
        guard.observe(
            StepRecord([0], [0], [0], [0], load=Load(1, 1, 100), num_tokens=1, seconds={"draft": 0.0, "target": 0.0})
        )
    assert not guard.is_drafting and not guard._took


def test_one_hard_text_does_not_condemn_those_after_it():
    """Drafts pay on the whole, though not for every text, and the first texts are among those for which they do not."""
    machine, speeds, always = Machine(per_token=0.1, per_draft=0.7), [], []
    for seed in range(8):
        random = np.random.default_rng(seed)
        texts: list[tuple[float, Hashable]] = [(a, None) for a in (0.4, 0.4, *random.uniform(0.35, 0.85, 30))]
        speeds.append(one_after_the_other(texts, machine, seed))
        always.append(one_after_the_other(texts, machine, seed, is_guarded=False))
    assert np.mean(always) > 1.02
    assert np.mean(speeds) > 1.01 * np.mean(always)


def test_a_text_that_nobody_has_drafted_for_is_given_a_chance():
    """Texts differ, so one that comes after a hard one may well be easy. A run of a few texts shows it at once or never."""
    machine, texts, seeds = Machine(per_token=0.1, per_draft=0.7), [(a, None) for a in (0.5, 0.75, 0.75) * 2], range(16)
    speeds = [one_after_the_other(texts, machine, seed) for seed in seeds]
    always = [one_after_the_other(texts, machine, seed, is_guarded=False) for seed in seeds]
    assert np.mean(speeds) > 0.99 * np.mean(always) > 1.1


def test_chances_for_new_texts_cost_little_where_all_are_hard():
    machine, texts = Machine(per_token=0.1, per_draft=0.7), [(0.35, None)] * 20
    assert np.mean([one_after_the_other(texts, machine, seed) for seed in range(2)]) > 0.98


def test_a_text_behind_a_long_prompt_is_not_drafted_for_and_those_behind_short_ones_are():
    """The drafter would have to read the long one first; what prompts take on average says too little of it, and too much
    of the others.
    """
    machine, prompts = Machine(per_token=0.1, per_draft=0.4), (20, 20, 20, 8000)
    machine.per_unread, texts, speeds = 0.02, [(0.75, None)] * 40, []
    for choices in (prompts, (20, 20, 20, 20)):
        speeds.append(np.mean([one_after_the_other(texts, machine, seed, prompts=choices) for seed in range(2)]))
    assert speeds[1] > 1.1
    # A quarter of them are written plainly.
    assert speeds[0] > 0.9 * 4 / (3 / speeds[1] + 1)


def test_what_is_known_of_one_kind_of_request_is_not_said_of_another():
    machine, speeds = Machine(per_token=0.1, per_draft=0.7), []
    texts: list[tuple[float, Hashable]] = [(0.85, "easy") if n % 4 < 2 else (0.3, "hard") for n in range(40)]
    for kinds in (True, False):
        told = [(acceptance, kind if kinds else None) for acceptance, kind in texts]
        speeds.append(np.mean([one_after_the_other(told, machine, seed) for seed in range(2)]))
    assert speeds[0] > 1.05 * speeds[1]


def test_a_drafter_that_seldom_finds_anything_costs_next_to_nothing():
    """What it finds pays, but not for the looking."""
    machine, texts = Machine(per_token=0.1, per_draft=0.1), [(0.7, None)] * 30
    assert one_after_the_other(texts, machine, 0, is_guarded=False, finds=0.1) < 0.95
    assert np.mean([one_after_the_other(texts, machine, seed, finds=0.1) for seed in range(2)]) > 0.98


def test_a_drafter_that_finds_little_is_asked_as_long_as_that_costs_less():
    """What drafts are worth is told by those that were found; asking in vain only costs."""

    class Cheap(Machine):
        def draft_seconds(self, requests, context_tokens):
            return 0.02 * requests

    machine, texts = Cheap(per_token=0.02, per_draft=0.0), [(0.8, None)] * 20
    always = np.mean([one_after_the_other(texts, machine, seed, is_guarded=False, finds=0.1) for seed in range(3)])
    guarded = np.mean([one_after_the_other(texts, machine, seed, finds=0.1) for seed in range(3)])
    assert always > 1.15 and guarded > 0.97 * always
