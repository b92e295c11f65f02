"""What users call: prompts in, requests under way, what came of them. The step itself is in loop.py."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from dspark.budget.capacity import Capacity, usual_path
from dspark.budget.guard import Guard
from dspark.budget.raw_beliefs import RawBeliefs
from dspark.budget.schedulers import AUTO, make_scheduler
from dspark.drafters.none import NoDrafter
from dspark.engine.batcher import Batcher
from dspark.engine.choosing import Choosing, heeds_beliefs
from dspark.engine.drafting import Drafting
from dspark.engine.given import features_for, refuse_names
from dspark.engine.intake import Intake
from dspark.engine.ledger import Ledger
from dspark.engine.loop import plain_step
from dspark.engine.machine import fingerprint, live_beliefs
from dspark.engine.measuring import Grid, measure
from dspark.engine.neighbours import neighbours_over
from dspark.engine.overlapped import Overlapped
from dspark.engine.prefix_cache import PrefixCache
from dspark.engine.scoring import Scoring
from dspark.engine.stream import RunningText, Stream
from dspark.engine.text import Prompt, as_prompts
from dspark.errors import InvalidConfiguration, InvalidRequest
from dspark.gradients import without_gradients
from dspark.sampling import KeyedDraws
from dspark.target.target import Target
from dspark.types import (
    Beliefs,
    Drafter,
    Generation,
    Observer,
    PrefixScheduler,
    Request,
    SamplingParams,
    StepRecord,
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
    max_length          tokens of one request, prompt and output, at most; None: what the target can read and hold
    prefix_tokens       tokens of past requests that are kept so as not to read them again; 0: no prefix cache
    compile             compile target and drafter: faster steps after tens of seconds of warm-up
    overlap             launch plain steps before the ones before are read; read drafts once they are judged (overlapped.py)
    observers           called with the StepRecord of every step

    Raises InvalidConfiguration for options that do not go together, such as a scheduler that looks at draft tokens with
    the rejection rule, which would bias it (paper, Appendix A).
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
        max_length: int | None = None,
        prefix_tokens: int = 0,
        compile: bool = False,
        overlap: bool = False,
        observers: Sequence[Observer] = (),
        beliefs: Beliefs | None = None,
        capacity: Capacity | None = None,
        guard: Guard | None = None,
    ) -> None:
        refuse_names(target, drafter)
        self.target, self.drafter = target, NoDrafter() if drafter is None else drafter
        self.feature_layers = features_for(self.drafter, target.num_layers)
        self.rule = make_rule(rule, KeyedDraws(target.vocab_size, target.device))
        about = fingerprint(target, self.drafter, compile, overlap)
        self.capacity = Capacity.load_or_new(usual_path(about), about) if capacity is None else capacity
        chosen_by = make_scheduler(scheduler, self.capacity, self.rule.allows_anticipation)
        self.rule.reports_chances = heeds_beliefs(chosen_by)
        self.guard = Guard(self.capacity) if guard is None and scheduler == AUTO else guard
        are_heeded = beliefs is not None or self.guard is not None or heeds_beliefs(chosen_by)
        if beliefs is None:  # nobody waits for what nobody heeds
            beliefs = live_beliefs(target, self.drafter, rule) if heeds_beliefs(chosen_by) else RawBeliefs()
        self.beliefs, self.observers = beliefs, list(observers)
        self.drafting = Drafting(self.drafter, target, self.rule, self.guard)
        self.choosing = Choosing(chosen_by, beliefs, self.capacity, are_heeded, self.observers)
        self.learners: list[Any] = [x for x in (beliefs, self.capacity, self.guard, chosen_by) if hasattr(x, "observe")]
        if num_slots is not None:
            target.resize(num_slots)
        lookahead = 1 + self.drafter.length
        if max_num_seqs < 1 or max_num_batched_tokens < 1:
            raise InvalidConfiguration("max_num_seqs and max_num_batched_tokens must be 1 or more")
        if prefix_tokens < 0:
            raise InvalidConfiguration(f"prefix_tokens must be 0 or more; got {prefix_tokens}")
        self.max_length = _longest(target, lookahead, max_length)
        self.batcher = Batcher(max_num_seqs, max_num_batched_tokens, lookahead)
        self.tokens_per_request = float(lookahead)  # of those that decoded last: what a step has to leave for them
        self.prefixes = PrefixCache(target.cache, prefix_tokens) if prefix_tokens else None
        self.ledger = Ledger(target, self.batcher, self.drafting, self.prefixes, self.max_length)
        self.scoring = Scoring(target, self.drafting, max_num_batched_tokens)
        self.neighbours = neighbours_over(target.cache)
        self._abandoned: deque[Request] = deque()
        self._step = Overlapped(self.drafter, self.rule, chosen_by, self.guard).step if overlap else plain_step
        if compile:
            target.compile(self.feature_layers)
            if hasattr(self.drafter, "compile"):  # a user's own drafter need not have it
                self.drafter.compile()
                self._warm_up()

    def _warm_up(self) -> None:
        """Decode a little, alone and in full company, with prompts of many lengths: graphs are built at their first calls,
        and again when the drafter's rows grow, which nobody should wait for and nothing should be learned from. Then, for
        a calibrated drafter, a second or two of steps that show what they cost, where that is not known.
        """
        learners, observers, guard = self.learners, self.observers, self.drafting.guard
        self.learners, self.observers, self.drafting.guard = [], [], None
        params = SamplingParams(max_tokens=2 * (2 + self.drafter.length), ignore_eos=True, seed=0)
        for num_requests in (1, self.batcher.max_running, self.batcher.max_running):
            lengths = (min(2 + n % 16, self.max_length - 1) for n in range(num_requests))
            self.generate([[0] * length for length in lengths], params)
        # Else the first requests pay for finding out whether drafts pay. A drafter of which nobody knows what its drafts
        # are worth is to be tried on real text first.
        if not self.capacity.is_known and getattr(self.drafter, "calibration", None) is not None:
            self.learners = [self.capacity]
            measure(self, _SHORT_GRID)
        self.learners, self.observers, self.drafting.guard = learners, observers, guard

    def __repr__(self) -> str:
        kinds = f"{type(self.drafter).__name__}, {type(self.choosing.scheduler).__name__}, {type(self.rule).__name__}"
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

        One SamplingParams for all or one for each. `raw` continues strings as they stand, without the chat template;
        prompt and text are then one text, the space between them included, as they are for token ids with `raw`.
        Raises InvalidRequest before any of them begins, where one cannot be served. What it raises later (an interrupt,
        a forward that fails) ends these requests and no others.
        """
        prompts = as_prompts(prompts)
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
        """Continue one prompt and hand out its text as it comes. Raises InvalidRequest at once, as `generate` does."""
        return Stream(self, self.submit(prompt, params, raw))

    def submit(self, prompt: Prompt, params: SamplingParams | None = None, raw: bool = False) -> Request:
        """Queue a prompt; `step` until `finish_reason` is set, then ask for `result`. Raises InvalidRequest."""
        return self.enqueue(self.prepare(prompt, params, raw))

    @property
    def intake(self) -> Intake:
        """What prompts and parameters are checked against."""
        target = self.target
        return Intake(target.tokenizer, target.vocab_size, self.max_length, target.end_token_ids)

    def prepare(self, prompt: Prompt, params: SamplingParams | None = None, raw: bool = False) -> Request:
        """Check a prompt and make a request of it, which `enqueue` takes. Any thread may do this while another steps.

        Raises InvalidRequest: an empty prompt, one too long for `max_length`, token ids or parameters out of range.
        """
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise InvalidRequest(f"params must be SamplingParams(temperature=0, ...); got {params!r:.80}")
        request = self.intake.prepare(prompt, params, raw)
        if params.grammar is not None:
            request.matcher = params.grammar.matcher()
        if self.target.tokenizer is not None:
            request.text = RunningText(self.target.tokenizer, params.stop, params.min_tokens, request.context)
        return request

    def enqueue(self, request: Request) -> Request:
        """Let a prepared request wait for its turn."""
        queue = self.batcher.waiting if request.params.prompt_logprobs is None else self.scoring.waiting
        queue.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Stop a request and free all it holds; a finished one stays as it is."""
        with self.target.turn:
            if request.finish_reason is None:
                self.ledger.finish(request, "cancelled")

    def abandon(self, request: Request) -> None:
        """Cancel a request before the next step: for who may be called at any moment, in the middle of a step too."""
        if request.finish_reason is None:
            self._abandoned.append(request)

    def set_aside(self) -> None:
        """Give back every slot: who runs waits again, first in line, and is read anew. For work that yields to other work."""
        while self.batcher.running:
            request = self.batcher.running.pop()
            self.batcher.waiting.appendleft(request)
            self.ledger.forget(request)
        self._take_back(self.batcher.waiting)
        self.scoring.set_aside()

    def fail_running(self) -> list[Request]:
        """After `step` raised: end the requests that were in it with reason `error` and free all they hold."""
        scored = [request for request in self.scoring.busy if request.finish_reason is None]
        failed = scored or list(self.batcher.running or self.batcher.waiting)  # the last: as it let them in
        for request in failed:
            self.ledger.finish(request, "error")
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
            prompt_logprobs=None if request.params.prompt_logprobs is None else list(request.prompt_logprobs),
            is_drafted=list(request.is_drafted),
            seed=request.seed,
        )

    @property
    def has_work(self) -> bool:
        """Whether `step` would move any request on."""
        return bool(self.batcher.waiting or self.batcher.running or self.scoring.waiting)

    # -- the step -------------------------------------------------------------------------------------------------------

    @without_gradients  # not inference_mode: its tensors would have every graph compiled again, without packed weights
    def step(self) -> StepRecord:
        """Move every running request on by one target pass. Threads, and engines with the same target, take turns.

        After it raised, whatever it was, the next call reads anew the requests that are still there.
        """
        with self.target.turn:
            while self._abandoned:
                self.cancel(self._abandoned.popleft())
            if self.ledger.is_torn:  # who is still here is read anew
                self.set_aside()
                self.ledger.is_torn = False
            try:
                scored = self._score() if self.scoring.waiting else []
                record = self._step(self)
            except BaseException:
                self.ledger.is_torn = True
                raise
            finally:
                self.neighbours.note_step(self)
            if scored:
                self._take_back(self.batcher.waiting)
            return record

    def _score(self) -> list[Request]:
        """Read on in prompts whose log-probabilities are asked for; the requests that may now go on."""
        batcher, num_free = self.batcher, self.target.num_free_slots
        if batcher.waiting and not batcher.running and not batcher.could_admit(num_free):
            self.scoring.set_aside()  # else they might wait for each other
            return []
        scored = []
        for request in self.scoring.step(batcher.need(), self.feature_layers):
            if request.params.max_tokens:
                batcher.waiting.append(request)
                scored.append(request)
            else:
                self.ledger.finish(request, "length")
        return scored

    def _take_back(self, waiting: Iterable[Request]) -> None:
        """Slots are for who runs: a prompt that was scored, and could not go on at once, is read anew in its turn."""
        for request in waiting:
            if request.num_cached:
                self.ledger.forget(request)


def _longest(target: Target, lookahead: int, wanted: int | None) -> int:
    """Tokens of the longest request: it must fit when it is alone, its speculative slots included."""
    if wanted is not None and wanted < 2:
        raise InvalidConfiguration(f"max_length must be 2 or more, a prompt and an answer; got {wanted}")
    longest = min(target.max_length, target.cache.limit - lookahead)
    if longest < 2:
        raise InvalidConfiguration(f"{target.cache.limit} slots hold no request: use at least {lookahead + 2}")
    return longest if wanted is None else min(longest, wanted)
