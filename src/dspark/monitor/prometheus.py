"""`/metrics`: what an operator asks of a server that speculates. Counters first, so that any window can be asked for.

The four `vllm:spec_decode_*` counters carry vLLM's names and meaning, so that tools made for it (`vllm bench serve`)
read them here. Everything else is `dspark_*`. Labels come from closed sets: no request can add a time series.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from dspark.errors import DSparkError
from dspark.monitor.calibration_error import Reliability
from dspark.monitor.drift import CLASSES
from dspark.monitor.judged import judged_tokens
from dspark.monitor.load_metrics import LoadMetrics
from dspark.monitor.recent import RecentRatio
from dspark.monitor.request_metrics import Objectives, RequestMetrics
from dspark.monitor.series import Counter, Registry
from dspark.monitor.speedup import PlainReference
from dspark.types import StepRecord

try:
    import prometheus_client as prom
except ImportError as error:
    raise DSparkError('metrics need prometheus-client: pip install "dspark[serve]"') from error

if TYPE_CHECKING:
    from dspark.monitor.canaries import Outcome
    from dspark.types import RequestRecord

MAX_POSITIONS = 32  # draft positions with a series of their own; deeper ones count with the last
PHASES = ("admit", "draft", "schedule", "target", "verify", "commit", "learn")
SKIP_REASONS = ("cost", "difficulty", "measuring a plain step")  # those of budget/guard.py
DRIFT_SIGNALS = ("first_token_acceptance", "target_logprob")
OUTCOMES = ("equal", "explained", "unexplained", "unjudged", "abandoned")
_OTHER = "other"
_MEMORY_SECONDS = 60.0  # of steps, in the gauges that fade
_MEMORY_PROMPT_TOKENS = 20_000.0  # of the hit ratio of prefixes
_STEP = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56)
_LENGTHS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32)


class Metrics:
    """Observes every engine step (`step`) and every finished request (`request`); `render` is the page that is scraped.

    target, drafter  names as the server was started with them: labels of the counters
    num_slots        tokens that the KV cache holds
    cost             seconds of a step by (tokens, requests, context tokens), as measured; without it there is no regret
    process          CPU and memory of this process and, where there is one, of the GPU
    """

    def __init__(
        self,
        target: str,
        drafter: str,
        num_slots: int,
        objectives: Objectives | None = None,
        cost: Callable[[int, int, int], float] | None = None,
        process: bool = True,
    ) -> None:
        self.target, self.drafter, self.num_slots = target, drafter, num_slots
        self.cost = cost
        prom.disable_created_metrics()  # `vllm bench serve` adds up every line of a name, creation times included
        self.registry = Registry()
        self.plain = PlainReference()
        self.reliability = Reliability()
        self.cost_error, self.regret = RecentRatio(_MEMORY_SECONDS), RecentRatio(_MEMORY_SECONDS)
        self.prefix_hits = RecentRatio(_MEMORY_PROMPT_TOKENS)
        self._make_speculation()
        self._make_engine()
        self.requests = RequestMetrics(self.registry, objectives or Objectives())
        self.load = LoadMetrics(self.registry)
        self._make_checks()
        self._info(target, drafter)
        if process:
            from dspark.monitor.resources import GpuCollector

            prom.ProcessCollector(registry=self.registry)
            self.registry.register(GpuCollector())

    def render(self) -> bytes:
        """The page that Prometheus scrapes, in its text format (`content_type`)."""
        page: bytes = prom.generate_latest(self.registry)
        return page

    content_type: str = prom.CONTENT_TYPE_LATEST

    # -- definitions ----------------------------------------------------------------------------------------------------

    def _info(self, target: str, drafter: str) -> None:
        from dspark import __version__

        info = prom.Info("dspark_build", "what is being served", registry=self.registry)
        info.info({"version": __version__, "target": target, "drafter": drafter})

    def _make_speculation(self) -> None:
        def vllm(name: str, text: str) -> Counter:
            return self.registry.counters(f"vllm:spec_decode_{name}", text, "model_name").labels(self.target)

        def ours(name: str, text: str) -> Counter:
            return self.registry.counters(f"dspark_{name}", text, "drafter").labels(self.drafter)

        self.num_drafts = vllm("num_drafts", "drafts of which the target read at least one token")
        self.num_draft_tokens = vllm("num_draft_tokens", "draft tokens that the target read")
        self.num_accepted_tokens = vllm("num_accepted_tokens", "draft tokens accepted")
        name, text = "vllm:spec_decode_num_accepted_tokens_per_pos", "draft tokens accepted, by position in the draft"
        per_position = self.registry.counters(name, text, "model_name", "position")
        self.accepted_at = [per_position.labels(self.target, str(k)) for k in range(MAX_POSITIONS)]
        reached = self.registry.counters(
            "dspark_reached_tokens_per_pos", "draft tokens judged, by position", "position"
        )
        self.reached_at = [reached.labels(str(k)) for k in range(MAX_POSITIONS)]

        self.drafted = ours("drafted_tokens", "draft tokens proposed, read or not")
        self.pruned = ours("pruned_draft_tokens", "draft tokens proposed that the scheduler left unread")
        self.wasted = ours("wasted_draft_tokens", "draft tokens read and rejected")
        self.proposals = ours("proposals", "decoding passes of a request for which anything was proposed")
        self.first_hits = ours("first_token_hits", "drafts whose first token was accepted")
        self.full_hits = ours("full_draft_hits", "drafts accepted whole, nothing of them pruned")
        self.emitted_by_drafter = ours("accepted_tokens", "draft tokens accepted, by who proposed them")
        self.draft_faults = ours("draft_faults", "passes that lost their draft because the drafter failed")
        skipped = self.registry.counters(
            "dspark_skipped_drafts", "passes for which drafting was left out, by reason", "reason"
        )
        self.skipped = {reason: skipped.labels(reason) for reason in (*SKIP_REASONS, _OTHER)}
        self.verified_length = self.registry.histogram("dspark_verified_length", "draft tokens read per pass", _LENGTHS)

    def _make_engine(self) -> None:
        self.passes = self.registry.counter(
            "dspark_decode_passes", "target passes of decoding requests, one each per step"
        )
        self.committed = self.registry.counter("dspark_committed_tokens", "tokens committed by decoding passes")
        self.prompt_tokens = self.registry.counter("dspark_prompt_tokens", "prompt tokens read")
        self.prefix_asked = self.registry.counter(
            "dspark_prefix_asked_tokens", "prompt tokens looked up in the prefix cache"
        )
        self.prefix_found = self.registry.counter("dspark_prefix_found_tokens", "of which the target need not read")
        prefix_hits = self.registry.gauge(
            "dspark_prefix_hit_ratio", "recent share of prompt tokens found; NaN without a look-up"
        )
        prefix_hits.set_function(lambda: self.prefix_hits.value)
        self.preempted = self.registry.counter(
            "dspark_preemptions", "requests put back into the queue for lack of slots"
        )
        self.steps = self.registry.histogram("dspark_step_seconds", "seconds per engine step", _STEP)
        phase = self.registry.counters("dspark_phase_seconds", "seconds of engine steps, by phase", "phase")
        self.phase_seconds = {name: phase.labels(name) for name in (*PHASES, _OTHER)}
        self.running = self.registry.gauge("dspark_requests_running", "requests being decoded or read")
        self.waiting = self.registry.gauge("dspark_requests_waiting", "requests in the queue")
        self.kv_usage = self.registry.gauge("dspark_kv_usage_ratio", "share of the KV slots in use")
        self.registry.gauge("dspark_kv_slots", "tokens that the KV cache holds").set(self.num_slots)
        capacity = self.registry.gauges(
            "dspark_capacity_requests_per_second", "that fit, by what gives way beyond; NaN until known", "bound"
        )
        self.capacity = {bound: capacity.labels(bound) for bound in ("objectives", "saturation")}
        for gauge in self.capacity.values():
            gauge.set(math.nan)
        self.speculative_seconds = self.registry.counter(
            "dspark_speculative_seconds", "seconds of speculative steps whose plain cost is known"
        )
        self.plain_seconds = self.registry.counter(
            "dspark_plain_equivalent_seconds", "seconds that plain decoding takes for the tokens of the same steps"
        )
        speedup = self.registry.gauge(
            "dspark_speedup_vs_plain", "recent measured speed-up; NaN until plain steps were measured"
        )
        speedup.set_function(lambda: self.plain.speedup)

    def _make_checks(self) -> None:
        canaries = self.registry.counters(
            "dspark_canaries", "finished requests replayed without speculation", "outcome"
        )
        self.canaries = {name: canaries.labels(name) for name in OUTCOMES}
        alarms = self.registry.counters(
            "dspark_drift_alarms", "changes that nobody announced", "signal", "request_class"
        )
        self.drift_alarms = {(s, c): alarms.labels(s, c) for s in DRIFT_SIGNALS for c in CLASSES}
        self.drift_alarms["beliefs", "all"] = alarms.labels("beliefs", "all")  # of the budget, about draft tokens
        self.belief_drift = self.registry.gauge(
            "dspark_belief_drift", "standard deviations by which recent drafts fare other than believed"
        )
        by_bin = {
            name: self.registry.counters(f"dspark_confidence_{name}", text, "bin")
            for name, text in (
                ("tokens", "draft tokens judged, by stated confidence"),
                ("accepted", "of which accepted"),
                ("sum", "their confidences, added up"),
            )
        }
        self.bins = [
            tuple(by_bin[n].labels(label) for n in ("tokens", "accepted", "sum")) for label in self.reliability.labels
        ]
        error = self.registry.gauge(
            "dspark_calibration_error", "recent expected calibration error of beliefs; NaN without any"
        )
        error.set_function(lambda: self.reliability.error)
        self.predicted_seconds = self.registry.counter("dspark_predicted_step_seconds", "as the scheduler believed")
        self.measured_seconds = self.registry.counter(
            "dspark_measured_step_seconds", "of the same steps, drafting left out"
        )
        self.cost_error_seconds = self.registry.counter("dspark_cost_error_seconds", "between the two, step by step")
        gauge = self.registry.gauge(
            "dspark_cost_error_ratio", "recent share of step time by which predictions were off"
        )
        gauge.set_function(lambda: self.cost_error.value)
        self.regret_seconds = self.registry.counter(
            "dspark_regret_seconds", "that a scheduler would have saved that knew every verdict beforehand"
        )
        gauge = self.registry.gauge(
            "dspark_regret_ratio", "recent share of step time spent on draft tokens that were rejected"
        )
        gauge.set_function(lambda: self.regret.value)

    # -- observers ------------------------------------------------------------------------------------------------------

    def step(self, record: StepRecord) -> None:
        """Observer of engine steps."""
        seconds = sum(record.seconds.values())
        self.steps.observe(seconds)
        for phase, spent in record.seconds.items():
            self.phase_seconds.get(phase, self.phase_seconds[_OTHER]).inc(spent)
        self.running.set(record.num_running)
        self.waiting.set(record.num_waiting)
        self.kv_usage.set(1 - record.num_free_slots / self.num_slots)
        self.prompt_tokens.inc(record.num_prompt_tokens)
        self.preempted.inc(record.num_preempted)
        if record.num_prefix_asked:
            self.prefix_asked.inc(record.num_prefix_asked)
            self.prefix_found.inc(record.num_prefix_found)
            self.prefix_hits.add(record.num_prefix_found, record.num_prefix_asked)
        if not record.request_ids:
            return
        self._count_drafts(record)
        self._count_verdicts(record)
        self._compare_with_belief(record)
        self.load.observe(record)
        self._compare_with_plain(record, seconds)

    def at_rest(self) -> None:
        """Nothing runs or waits: cancelled requests end without a step that would say so."""
        for gauge in (self.running, self.waiting, self.kv_usage):
            gauge.set(0)

    def _count_drafts(self, record: StepRecord) -> None:
        drafted, verified, accepted = sum(record.drafted), sum(record.verified), sum(record.accepted)
        self.passes.inc(len(record.request_ids))
        self.committed.inc(accepted + len(record.request_ids))
        self.num_drafts.inc(sum(v > 0 for v in record.verified))
        self.num_draft_tokens.inc(verified)
        self.num_accepted_tokens.inc(accepted)
        self.emitted_by_drafter.inc(accepted)
        self.drafted.inc(drafted)
        self.pruned.inc(drafted - verified)
        self.wasted.inc(verified - accepted)
        num_proposals = sum(d > 0 for d in record.drafted)
        self.proposals.inc(num_proposals)
        if record.num_skipped:
            self.skipped.get(record.skip_reason or _OTHER, self.skipped[_OTHER]).inc(record.num_skipped)
        self.draft_faults.inc(record.num_faults)
        self.first_hits.inc(sum(a > 0 for a in record.accepted))
        self.full_hits.inc(sum(d == a > 0 for d, a in zip(record.drafted, record.accepted, strict=True)))
        for length in record.verified:
            self.verified_length.observe(length)

    def _count_verdicts(self, record: StepRecord) -> None:
        accepted, reached = [0] * MAX_POSITIONS, [0] * MAX_POSITIONS
        stated = []
        for position, is_right, belief in judged_tokens(record):
            k = min(position, MAX_POSITIONS - 1)
            reached[k] += 1
            accepted[k] += is_right
            if belief is not None:
                stated.append((is_right, belief))
        for counters, counts in ((self.accepted_at, accepted), (self.reached_at, reached)):
            for counter, count in zip(counters, counts, strict=True):
                if count:
                    counter.inc(count)
        for b, amounts in self.reliability.add(stated):
            for counter, amount in zip(self.bins[b], amounts, strict=True):
                counter.inc(amount)

    def _compare_with_belief(self, record: StepRecord) -> None:
        """What the step cost beside what the scheduler thought, and beside what a scheduler that knew all would have."""
        if record.predicted_seconds > 0 and record.step_seconds > 0:
            error = abs(record.predicted_seconds - record.step_seconds)
            self.predicted_seconds.inc(record.predicted_seconds)
            self.measured_seconds.inc(record.step_seconds)
            self.cost_error_seconds.inc(error)
            self.cost_error.add(error, record.step_seconds)
        num_wasted = sum(record.verified) - sum(record.accepted)
        if self.cost is not None and record.num_tokens:
            requests = record.load.num_requests if record.load else len(record.request_ids)
            read = needed = self.cost(record.num_tokens, requests, record.num_context_tokens)
            if num_wasted:
                needed = self.cost(record.num_tokens - num_wasted, requests, record.num_context_tokens)
            self.regret_seconds.inc(max(0.0, read - needed))
            self.regret.add(max(0.0, read - needed), read)

    def _compare_with_plain(self, record: StepRecord, seconds: float) -> None:
        if record.num_prompt_tokens:
            return  # its time is not that of decoding alone
        num_requests = len(record.request_ids)
        if not sum(record.drafted):
            self.plain.observe(num_requests, seconds)
            return
        plain = self.plain.count(num_requests, num_requests + sum(record.accepted), seconds)
        if plain is not None:
            self.speculative_seconds.inc(seconds)
            self.plain_seconds.inc(plain)

    def request(self, record: RequestRecord) -> None:
        """Observer of finished requests."""
        self.requests.observe(record)

    def plain_step(self, record: StepRecord) -> None:
        """Observer of plain steps outside of serving (canaries): what plain decoding takes here and now."""
        if record.request_ids and not record.num_prompt_tokens:
            self.plain.observe(len(record.request_ids), sum(record.seconds.values()))

    def canary(self, outcome: Outcome) -> None:
        """Observer of replayed requests."""
        self.canaries[outcome.kind].inc()
