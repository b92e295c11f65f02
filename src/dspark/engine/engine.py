"""The loop: admit, propose, choose, extend, verify, commit. Generation, serving and benchmarks all run this one step."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from dspark.budget.capacity import Capacity, Fingerprint, usual_path
from dspark.budget.guard import Guard
from dspark.budget.hindsight import rates
from dspark.budget.prefix_scheduler import falling_survival
from dspark.budget.raw_beliefs import RawBeliefs
from dspark.budget.schedulers import AUTO, make_scheduler
from dspark.drafters.none import NoDrafter
from dspark.engine.batcher import Batcher, is_reading
from dspark.engine.drafting import Drafting
from dspark.engine.intake import Intake
from dspark.engine.machine import fingerprint, live_beliefs
from dspark.engine.measuring import Grid, measure
from dspark.engine.prefix_cache import PrefixCache
from dspark.engine.stream import RunningText, Stream
from dspark.engine.text import Prompt
from dspark.errors import InvalidConfiguration, InvalidRequest
from dspark.sampling import KeyedDraws, token_logprobs
from dspark.target.target import Extension, Target
from dspark.types import (
    Beliefs,
    Draft,
    Drafter,
    Generation,
    Load,
    Observer,
    PrefixScheduler,
    Request,
    Round,
    SamplingParams,
    Span,
    StepRecord,
    Verdict,
)
from dspark.verify import make_rule

_SHORT_GRID = Grid(requests=(1, 4, 8, 16, 32), contexts=(64, 256), repeats=3, seconds=2.0)


class Engine:
    """Continuous batching over one target and one drafter.

    target, drafter     from `load_target` and `load_drafter`; no drafter is plain decoding
    scheduler           which draft tokens are verified: `auto`, `fixed:7`, … (budget/schedulers.py), or an object
    capacity            what steps cost, as far as it is known; every step refines it. None: what `dspark profile` kept
                        for such an engine, else learned from the first steps
    guard               leaves out drafts that do not pay; None: `auto` brings one, the others draft always
    beliefs             how likely draft tokens are to survive; None: the drafter's calibrated confidences, kept
                        true while serving; its own word where the scheduler does not listen
    rule                `coupled`: same seed, same text, with and without speculation. `rejection`: the paper's rule
    max_num_seqs        requests decoded together at most
    max_num_batched_tokens  prompts are read in chunks that fill a step up to this many tokens
    num_slots           tokens that the KV cache can hold; None keeps the target's own limit
    prefix_tokens       tokens of past requests that are kept so as not to read them again; 0: no prefix cache
    compile             compile target and drafter: faster steps after tens of seconds of warm-up
    observers           called with the StepRecord of every step
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None = None,
        scheduler: str | PrefixScheduler = AUTO,
        rule: str = "coupled",
        *,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 512,
        num_slots: int | None = None,
        prefix_tokens: int = 0,
        compile: bool = False,
        observers: Sequence[Observer] = (),
        beliefs: Beliefs | None = None,
        capacity: Capacity | None = None,
        guard: Guard | None = None,
    ) -> None:
        _refuse_names(target, drafter)
        self.target, self.drafter = target, NoDrafter() if drafter is None else drafter
        self.rule = make_rule(rule, KeyedDraws(target.vocab_size, target.device))
        self.capacity = _known_capacity(fingerprint(target, self.drafter, compile)) if capacity is None else capacity
        self.scheduler = make_scheduler(scheduler, self.capacity, self.rule.allows_anticipation)
        heeds_beliefs = getattr(self.scheduler, "heeds_beliefs", True)
        if beliefs is None:  # nobody waits for what nobody heeds
            beliefs = live_beliefs(target, self.drafter, rule) if heeds_beliefs else RawBeliefs()
        self.beliefs = beliefs
        # A length that the user fixed is never exceeded.
        self._explores = hasattr(beliefs, "wants_whole") and heeds_beliefs
        self.rule.reports_chances = heeds_beliefs
        self.guard = Guard(self.capacity) if guard is None and scheduler == AUTO else guard
        self.drafting = Drafting(self.drafter, target, self.rule, self.guard)
        self._learners: list[Any] = [
            x for x in (self.beliefs, self.capacity, self.guard, self.scheduler) if hasattr(x, "observe")
        ]
        if self.scheduler.anticipates and not self.rule.allows_anticipation:
            raise InvalidConfiguration(
                f"{type(self.scheduler).__name__} looks at draft tokens to decide how many to verify, which biases the "
                "rejection rule (paper, Appendix A): use rule='coupled', or a scheduler that does not anticipate"
            )
        if num_slots is not None:
            target.resize(num_slots)
        lookahead = 1 + self.drafter.length
        if max_num_seqs < 1 or max_num_batched_tokens < 1:
            raise InvalidConfiguration("max_num_seqs and max_num_batched_tokens must be 1 or more")
        if prefix_tokens < 0:
            raise InvalidConfiguration(f"prefix_tokens must be 0 or more; got {prefix_tokens}")
        # The longest request must fit when it is alone, its speculative slots included.
        self.max_length = min(target.max_length, target.cache.limit - lookahead)
        if self.max_length < 2:
            raise InvalidConfiguration(f"{target.cache.limit} slots hold no request: use at least {lookahead + 2}")
        self.batcher = Batcher(max_num_seqs, max_num_batched_tokens, lookahead)
        self._tokens_per_request = float(lookahead)  # of those that decoded last: what a step has to leave for them
        self.prefixes = PrefixCache(target.cache, prefix_tokens) if prefix_tokens else None
        self.observers = list(observers)
        self._abandoned: deque[Request] = deque()
        if compile:
            target.compile(self.drafter.feature_layers, num_requests=max_num_seqs)
            if hasattr(self.drafter, "compile"):  # a user's own drafter need not have it
                self.drafter.compile()
                self._warm_up()

    def _warm_up(self) -> None:
        """Decode a little, alone and in full company, with prompts of many lengths: graphs are built at their first calls,
        and again when the drafter's rows grow, which nobody should wait for and nothing should be learned from. Then, for
        a calibrated drafter, a second or two of steps that show what they cost, where that is not known.
        """
        learners, observers, guard = self._learners, self.observers, self.drafting.guard
        self._learners, self.observers, self.drafting.guard = [], [], None
        params = SamplingParams(max_tokens=2 * (2 + self.drafter.length), ignore_eos=True, seed=0)
        for num_requests in (1, self.batcher.max_running, self.batcher.max_running):
            lengths = (min(2 + n % 16, self.max_length - 1) for n in range(num_requests))
            self.generate([[0] * length for length in lengths], params)
        # Else the first requests pay for finding out whether drafts pay. A drafter of which nobody knows what its drafts
        # are worth is to be tried on real text first.
        if not self.capacity.is_known and getattr(self.drafter, "calibration", None) is not None:
            self._learners = [self.capacity]
            measure(self, _SHORT_GRID)
        self._learners, self.observers, self.drafting.guard = learners, observers, guard

    def __repr__(self) -> str:
        kinds = f"{type(self.drafter).__name__}, {type(self.scheduler).__name__}, {type(self.rule).__name__}"
        running, waiting = len(self.batcher.running), len(self.batcher.waiting)
        return f"Engine({self.target!r}, {kinds}; {running} requests running, {waiting} waiting)"

    # -- what users call ------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        raw: bool = False,
    ) -> list[Generation]:
        """Continue every prompt (a string, a list of chat messages, or token ids), all of them together.

        One SamplingParams for all or one for each. `raw` continues strings as they stand, without the chat template.
        """
        prompts = _as_list(prompts)
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(prompts):
            raise InvalidRequest(f"{len(prompts)} prompts need one SamplingParams or {len(prompts)}; got {len(each)}")
        requests = [self.prepare(p, s, raw) for p, s in zip(prompts, each, strict=True)]  # checked before any starts
        try:
            for request in requests:
                self.enqueue(request)
            while any(r.finish_reason is None for r in requests):
                self.step()
        finally:
            for request in requests:
                self.cancel(request)
        return [self.result(r) for r in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, raw: bool = False) -> Stream:
        """Continue one prompt and hand out its text as it comes."""
        return Stream(self, self.submit(prompt, params, raw))

    def submit(self, prompt: Prompt, params: SamplingParams | None = None, raw: bool = False) -> Request:
        """Queue a prompt; `step` until `finish_reason` is set, then ask for `result`."""
        return self.enqueue(self.prepare(prompt, params, raw))

    @property
    def intake(self) -> Intake:
        """What prompts and parameters are checked against."""
        target = self.target
        return Intake(target.tokenizer, target.vocab_size, self.max_length, target.end_token_ids)

    def prepare(self, prompt: Prompt, params: SamplingParams | None = None, raw: bool = False) -> Request:
        """Check a prompt and make a request of it, which `enqueue` takes. Any thread may do this while another steps."""
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise InvalidRequest(f"params must be SamplingParams(temperature=0, ...); got {params!r:.80}")
        request = self.intake.prepare(prompt, params, raw)
        if params.grammar is not None:
            request.matcher = params.grammar.matcher()
        if self.target.tokenizer is not None:
            request.text = RunningText(self.target.tokenizer, params.stop)
        return request

    def enqueue(self, request: Request) -> Request:
        """Let a prepared request wait for its turn."""
        self.batcher.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Stop a request and free all it holds; a finished one stays as it is."""
        with self.target.turn:
            if request.finish_reason is None:
                self._finish(request, "cancelled")

    def abandon(self, request: Request) -> None:
        """Cancel a request before the next step: for who may be called at any moment, in the middle of a step too."""
        if request.finish_reason is None:
            self._abandoned.append(request)

    def set_aside(self) -> None:
        """Give back every slot: who runs waits again, first in line, and is read anew. For work that yields to other work."""
        while self.batcher.running:
            request = self.batcher.running.pop()
            self.batcher.waiting.appendleft(request)
            self._forget(request)

    def fail_running(self) -> list[Request]:
        """After `step` raised: end the requests that were in it with reason `error` and free all they hold."""
        failed = list(self.batcher.running or self.batcher.waiting)  # nobody runs: it failed to let them in
        for request in failed:
            self._finish(request, "error")
        return failed

    def result(self, request: Request) -> Generation:
        """What a request has produced so far."""
        return Generation(
            prompt_token_ids=request.tokens[: request.num_prompt_tokens],
            token_ids=request.generated,
            text="" if request.text is None else request.text.everything(request.generated),
            finish_reason=request.finish_reason or "unfinished",
            rounds=list(request.rounds),
            logprobs=None if request.params.logprobs is None else list(request.logprobs),
            is_drafted=list(request.is_drafted),
            seed=request.seed,
        )

    @property
    def has_work(self) -> bool:
        return bool(self.batcher.waiting or self.batcher.running)

    # -- the step -------------------------------------------------------------------------------------------------------

    @torch.no_grad()  # not inference_mode: its tensors would have every graph compiled again, without packed weights
    def step(self) -> StepRecord:
        """Move every running request on by one target pass. Threads, and engines with the same target, take turns."""
        with self.target.turn:
            while self._abandoned:
                self.cancel(self._abandoned.popleft())
            return self._step()

    def _step(self) -> StepRecord:
        record = StepRecord()
        lap = _Laps(record.seconds)
        self._make_room(record)
        decoding = [r for r in self.batcher.running if not is_reading(r)]
        prompts = self.batcher.prompt_spans(math.ceil(len(decoding) * self._tokens_per_request))
        record.load = self._load(record, decoding, prompts)
        lap("admit")
        # A request with room for one more token needs no draft: the target's own next token ends it.
        with_room = [b for b, r in enumerate(decoding) if self._room(r) > 1]
        draft = self.drafting.propose(record, decoding, with_room)
        lap("draft")
        keep = self._choose(record, draft, decoding)
        spans = _verify_spans(decoding, draft, keep) + [span for _, span in prompts]
        lap("schedule")
        if spans:
            out = self.target.extend(spans, self.drafter.feature_layers)
            lap("target")
            judged = decoding + [r for r, span in prompts if span.num_logits]
            if len(judged) > len(decoding):
                draft = draft.among(range(len(decoding)), len(judged))
                keep = torch.cat([keep, keep.new_zeros(len(judged) - len(decoding), keep.shape[1])])
            verdict = self.rule.verify(draft, keep, out.logits, judged)
            lap("verify")
            self._record(record, decoding, draft, keep, verdict)
            record.rate, record.best_rate = rates(self.capacity, record)
            self._commit(decoding + [r for r, _ in prompts], spans, draft, keep, verdict, out)
            lap("commit")
        if decoding:
            self._tokens_per_request = (record.num_tokens - record.num_prompt_tokens) / len(decoding)
        record.num_running, record.num_waiting = len(self.batcher.running), len(self.batcher.waiting)
        record.num_free_slots = self.target.num_free_slots
        begin = time.perf_counter()
        for learner in self._learners:  # beliefs first: what they take is part of what the others are told of the step
            learner.observe(record)
            record.seconds["learn"] = time.perf_counter() - begin
        for observe in self.observers:
            observe(record)
        return record

    def _make_room(self, record: StepRecord) -> None:
        """Settle who runs in this step."""
        if self.prefixes is not None:
            for request in self.batcher.running:
                self.prefixes.take_in(request)
        for request in self.batcher.admit(self.target.num_free_slots):
            self._look_up(record, request)
        while (preempted := self.batcher.preempt(self.target.num_free_slots)) is not None:
            self._forget(preempted)
            record.num_preempted += 1

    def _look_up(self, record: StepRecord, request: Request) -> None:
        """Spare the target what it has read before."""
        if self.prefixes is None:
            return
        features = self.prefixes.attach(request)
        if features is not None:
            self.drafting.keep_features(request, features)
        if not request.generated:  # one that was preempted finds itself
            record.num_prefix_asked += request.num_prompt_tokens
            record.num_prefix_found += request.num_cached
            request.num_prompt_found = request.num_cached

    def _load(self, record: StepRecord, decoding: list[Request], prompts: list[tuple[Request, Span]]) -> Load:
        record.num_prompt_tokens = sum(len(span.tokens) for _, span in prompts)
        record.num_context_tokens = sum(r.num_cached for r in decoding) + sum(span.start for _, span in prompts)
        return Load(
            base_tokens=len(decoding) + record.num_prompt_tokens,
            num_requests=len(decoding) + len(prompts),
            context_tokens=record.num_context_tokens,
            num_prompt_tokens=record.num_prompt_tokens,
        )

    def _choose(self, record: StepRecord, draft: Draft, decoding: list[Request]) -> Tensor:
        assert record.load is not None
        load = record.load
        record.num_tokens = load.base_tokens
        if draft.tokens.shape[1] == 0:
            keep = torch.zeros(len(decoding), 0, dtype=torch.bool)
        else:
            record.predicted_draft_seconds = self.capacity.draft_seconds(record.num_asked, load.context_tokens)
            load = replace(load, draft_seconds=record.predicted_draft_seconds or record.draft_seconds)
            record.load, record.survival = load, falling_survival(draft, self.beliefs.survival(draft, decoding))
            keep = self.scheduler.choose(draft, record.survival, load)
            room = [self._room(r) - 1 for r in decoding]
            if min(room, default=0) < draft.tokens.shape[1]:
                keep = keep & (draft.depth <= torch.tensor(room)[:, None])
            if self._explores:
                whole = self.beliefs.wants_whole(len(decoding))  # type: ignore[attr-defined]  # _explores has asked
                record.chosen = keep
                if whole.numpy().any():
                    keep = keep | (whole[:, None] & draft.real & (draft.depth <= torch.tensor(room)[:, None]))
            record.predicted_accepted = float((record.survival.numpy() * keep.numpy()).sum())
            record.num_tokens += int(keep.numpy().sum())
        if self.capacity.is_known and record.num_tokens:
            record.predicted_seconds = self.capacity.seconds_of(
                record.num_tokens, load.num_requests, load.context_tokens, load.num_prompt_tokens > 0
            )
        return keep

    def _room(self, request: Request) -> int:
        """How many more tokens the request may get."""
        in_context = self.max_length - len(request.tokens)
        return min(in_context, request.num_prompt_tokens + request.params.max_tokens - len(request.tokens))

    def _commit(
        self, requests: list[Request], spans: list[Span], draft: Draft, keep: Tensor, verdict: Verdict, out: Extension
    ) -> None:
        """Write each verdict into its request; spans without logits are prompts that go on and have none."""
        sizes, kept, accepted = draft.sizes.tolist(), keep.tolist(), verdict.accepted.tolist()
        next_tokens = verdict.next_tokens.tolist()
        parents = None if draft.parents is None else draft.parents.tolist()
        first_token, first_row, b = 0, 0, 0
        for request, span in zip(requests, spans, strict=True):
            if not span.num_logits:
                self._cache(request, span, range(len(span.tokens)), first_token, out.features)
                first_token += len(span.tokens)
                continue
            nodes = [k for k, is_kept in enumerate(kept[b]) if is_kept]
            path = [i for i, node in enumerate(nodes) if accepted[b][node]]  # places among the kept tokens
            # The tokens before the first row with logits are prompt; the row itself is the anchor's.
            num_prompt = len(span.tokens) - span.num_logits
            chosen = [*range(num_prompt + 1), *(num_prompt + 1 + i for i in path)]
            drafted = [span.tokens[num_prompt + 1 + i] for i in path]
            if request.params.logprobs is not None:
                rows = torch.tensor([first_row, *(first_row + 1 + i for i in path)], device=out.logits.device)
                new = token_logprobs(out.logits[rows], [*drafted, next_tokens[b]], request.params.logprobs)
                request.logprobs += new
            if request.generated:
                end = nodes[path[-1]] if path else -1
                is_cut_short = None if parents is None else all(parents[b][node] != end for node in nodes)
                request.rounds.append(Round(sizes[b], len(nodes), len(path), is_cut_short))
            self._cache(request, span, chosen, first_token, out.features)
            self._append(request, drafted, next_tokens[b])
            first_token, first_row, b = first_token + len(span.tokens), first_row + span.num_logits, b + 1

    def _cache(
        self, request: Request, span: Span, chosen: Sequence[int], first_token: int, features: Tensor | None
    ) -> None:
        """Keep the chosen tokens of a span in the target's cache, and their features for the drafter."""
        if len(chosen) < len(span.tokens):
            self.target.keep(request.id, span.start, chosen)
        request.num_cached += len(chosen)
        if features is not None:
            if chosen[-1] == len(chosen) - 1:  # a run
                own = features[first_token : first_token + len(chosen)]
            else:
                own = features[first_token + torch.tensor(chosen, device=features.device)]
            self.drafting.keep_features(request, own)
            if self.prefixes is not None:
                self.prefixes.note(request, own)

    def _append(self, request: Request, drafted: list[int], next_token: int) -> None:
        """Commit tokens one by one, as if each had come alone: whatever ends the request drops the rest."""
        for token, is_drafted in [*((t, True) for t in drafted), (next_token, False)]:
            request.tokens.append(token)
            request.is_drafted.append(is_drafted)
            if reason := self._ending(request, token):
                del request.logprobs[len(request.generated) :]
                self._finish(request, reason)
                return

    def _ending(self, request: Request, token: int) -> str | None:
        params = request.params
        if token in params.stop_token_ids or (not params.ignore_eos and token in self.target.end_token_ids):
            return "stop"
        if request.text is not None and request.text.push(token):
            return "stop"
        return "length" if self._room(request) < 1 else None

    # -- bookkeeping ----------------------------------------------------------------------------------------------------

    def _finish(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        if request.text is not None:
            request.text.finish()
        self.batcher.remove(request)
        self._forget(request)

    def _forget(self, request: Request) -> None:
        if self.prefixes is not None:
            if request.finish_reason != "error":  # a step that raised may have left its books half written
                self.prefixes.take_in(request)
            self.prefixes.forget(request)
        self.target.release(request.id)
        self.drafting.forget(request)
        request.num_cached = 0

    def _record(
        self, record: StepRecord, decoding: list[Request], draft: Draft, keep: Tensor, verdict: Verdict
    ) -> None:
        n, accepted = len(decoding), verdict.accepted
        record.request_ids = [r.id for r in decoding]
        record.drafted = draft.sizes[:n].tolist()
        record.verified = keep[:n].numpy().sum(1).tolist()
        record.accepted = accepted[:n].numpy().sum(1).tolist()
        record.confidence = None if draft.confidence is None else draft.confidence[:n]
        record.parents = None if draft.parents is None else draft.parents[:n]
        record.kept, record.accepted_nodes = (x if len(x) == n else x[:n] for x in (keep, accepted))
        record.chances = None if verdict.chances is None else verdict.chances[:n]


def _known_capacity(about: Fingerprint) -> Capacity:
    """What `dspark profile` has measured of such an engine, or nothing yet."""
    return Capacity.load_or_new(usual_path(about), about)


def _verify_spans(requests: list[Request], draft: Draft, keep: Tensor) -> list[Span]:
    """The anchor of each request and its kept draft tokens, renumbered within the span."""
    spans = []
    parents = [None] * len(requests) if draft.parents is None else draft.parents.tolist()
    for request, tokens, kept, tree in zip(requests, draft.tokens.tolist(), keep.tolist(), parents, strict=True):
        nodes = [k for k, is_kept in enumerate(kept) if is_kept]
        place = {-1: 0} | {k: 1 + i for i, k in enumerate(nodes)}
        span_parents = None if tree is None else [-1, *(place[tree[k]] for k in nodes)]
        span_tokens = [request.tokens[-1], *(tokens[k] for k in nodes)]
        spans.append(Span(request.id, request.num_cached, span_tokens, span_parents, num_logits=len(span_tokens)))
    return spans


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A string, one conversation and one list of token ids are each a single prompt."""
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise InvalidRequest(f"prompts are a string, messages, token ids, or a list of these; got {prompts!r:.80}")
    is_single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], (int, dict)))
    return [cast(Prompt, prompts)] if is_single else list(cast(Sequence[Prompt], prompts))


def _refuse_names(target: object, drafter: object) -> None:
    if isinstance(target, str):
        raise InvalidConfiguration(f"Engine takes a target and not its name: Engine(load_target({target!r}), ...)")
    if isinstance(drafter, str):
        raise InvalidConfiguration(
            f"Engine takes a drafter and not its name: Engine(target, load_drafter({drafter!r}, target))"
        )


class _Laps:
    """Writes down how long each phase took, as it ends."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds, self._began = seconds, time.perf_counter()

    def __call__(self, phase: str) -> None:
        now = time.perf_counter()
        self._seconds[phase], self._began = now - self._began, now
