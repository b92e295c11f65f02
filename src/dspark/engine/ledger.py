"""Writing verdicts into requests: what each has got, and what it holds in the target, the drafter and the prefix cache."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dspark.engine.batcher import Batcher
from dspark.engine.drafting import Drafting
from dspark.engine.prefix_cache import PrefixCache
from dspark.sampling import token_logprobs
from dspark.target.target import Extension, Target
from dspark.transfer import on_device
from dspark.types import Draft, FeaturePiece, Request, Round, Span, StepRecord, Verdict


class Ledger:
    """One request's life in an engine: begin, commit step by step, finish.

    max_length  bounds prompt and output
    is_torn     the last step raised, or was interrupted: what requests hold may be half written
    """

    def __init__(
        self, target: Target, batcher: Batcher, drafting: Drafting, prefixes: PrefixCache | None, max_length: int
    ) -> None:
        self.target, self.batcher, self.drafting, self.prefixes = target, batcher, drafting, prefixes
        self.max_length, self.is_torn = max_length, False

    def begin(self, record: StepRecord, request: Request) -> None:
        """Spare the target what it has read before."""
        if self.prefixes is None or request.num_cached:  # the latter: it has been read for its log-probabilities
            return
        features = self.prefixes.attach(request)
        if features is not None:
            self.drafting.keep_features(request, FeaturePiece(features, 0, len(features)))
        if not request.has_begun:  # one that was preempted finds itself
            request.has_begun = True
            record.num_prefix_asked += request.num_prompt_tokens
            record.num_prefix_found += request.num_cached
            request.num_prompt_found = request.num_cached

    def room(self, request: Request) -> int:
        """How many more tokens the request may get."""
        in_context = self.max_length - len(request.tokens)
        return min(in_context, request.num_prompt_tokens + request.params.max_tokens - len(request.tokens))

    def commit(
        self, requests: list[Request], spans: list[Span], draft: Draft, keep: Tensor, verdict: Verdict, out: Extension
    ) -> None:
        """Write each verdict into its request; spans without logits are prompts that go on and have none."""
        sizes, kept, accepted = draft.sizes.tolist(), keep.tolist(), verdict.accepted.tolist()
        next_tokens = verdict.next_tokens.tolist()
        parents = None if draft.parents is None else draft.parents.tolist()
        first_row, b, end, num_alone = 0, 0, 0, 0
        if out.features is not None and self.prefixes is None:  # which wants every request's own at once
            # One who goes on reading a prompt is not asked about in the next step, as those are whose steps are let go of.
            more = (n for n, span in enumerate(spans) if len(span.tokens) > 1 or not span.num_logits)
            num_alone = next(more, len(spans))
        for request, span in zip(requests, spans, strict=True):
            first, end = end, end + len(span.tokens)
            features = out.features if first >= num_alone else None  # else the drafter's part of the step is told of it
            if not span.num_logits:
                self._cache(request, span, range(len(span.tokens)), features, first)
                continue
            nodes = [k for k, is_kept in enumerate(kept[b]) if is_kept]
            path = [i for i, node in enumerate(nodes) if accepted[b][node]]  # places among the kept tokens
            # The tokens before the first row with logits are prompt; the row itself is the anchor's.
            num_prompt = len(span.tokens) - span.num_logits
            chosen = [*range(num_prompt + 1), *(num_prompt + 1 + i for i in path)]
            drafted = [span.tokens[num_prompt + 1 + i] for i in path]
            logprobs = []
            if request.params.logprobs is not None:
                rows = on_device([first_row, *(first_row + 1 + i for i in path)], out.logits.device)
                logprobs = token_logprobs(out.logits[rows], [*drafted, next_tokens[b]], request.params.logprobs)
            self._cache(request, span, chosen, features, first)
            # What takes long lies behind: an interrupt hardly ever finds a round half written.
            request.logprobs += logprobs
            if request.generated:
                last = nodes[path[-1]] if path else -1
                is_cut_short = None if parents is None else all(parents[b][node] != last for node in nodes)
                request.rounds.append(Round(sizes[b], len(nodes), len(path), is_cut_short))
            self._append(request, drafted, next_tokens[b])
            first_row, b = first_row + span.num_logits, b + 1
        if out.features is not None:
            self.drafting.end_step(out.features, requests, num_alone)

    def finish(self, request: Request, reason: str) -> None:
        """End a request and free all it holds."""
        request.finish_reason = reason
        if request.text is not None:
            request.text.finish()
        self.batcher.remove(request)
        self.forget(request)

    def forget(self, request: Request) -> None:
        """Free all that a request holds: it has ended, or is to be read again."""
        if self.is_torn:  # in the middle of being committed, perhaps
            del request.logprobs[len(request.generated) :], request.is_drafted[len(request.generated) :]
        if self.prefixes is not None:
            if not self.is_torn:
                self.prefixes.take_in(request)
            self.prefixes.forget(request)
        self.target.release(request.id)
        self.drafting.forget(request)
        request.num_cached = 0

    def _cache(self, request: Request, span: Span, chosen: Sequence[int], features: Tensor | None, first: int) -> None:
        """Keep the chosen tokens of a span in the target's cache, and their features for the drafter: those of the whole
        step [T, F] have the span's from `first` on.
        """
        if len(chosen) < len(span.tokens):
            self.target.keep(request.id, span.start, chosen)
        request.num_cached += len(chosen)
        if features is None:
            return
        is_run = chosen[-1] == len(chosen) - 1
        piece = FeaturePiece(features, first, len(chosen), None if is_run else [first + place for place in chosen])
        self.drafting.keep_features(request, piece)
        if self.prefixes is not None:
            self.prefixes.note(request, piece)

    def _append(self, request: Request, drafted: list[int], next_token: int) -> None:
        """Commit tokens one by one, as if each had come alone: whatever ends the request drops the rest."""
        for token, is_drafted in [*((t, True) for t in drafted), (next_token, False)]:
            request.tokens.append(token)
            request.is_drafted.append(is_drafted)
            if reason := self._ending(request, token):
                del request.logprobs[len(request.generated) :]
                self.finish(request, reason)
                return

    def _ending(self, request: Request, token: int) -> str | None:
        params = request.params
        if request.text is not None and request.text.push(token):  # first: a token that ends the output is part of it
            return "stop"
        if token in params.stop_token_ids or (not params.ignore_eos and token in self.target.end_token_ids):
            return "stop"
        return "length" if self.room(request) < 1 else None


def verify_spans(requests: list[Request], draft: Draft, keep: Tensor) -> list[Span]:
    """The anchor of each request and its kept draft tokens, renumbered within the span."""
    spans = []
    parents = [None] * len(requests) if draft.parents is None else draft.parents.tolist()
    for request, tokens, kept, tree in zip(requests, draft.tokens.tolist(), keep.tolist(), parents, strict=True):
        nodes = [k for k, is_kept in enumerate(kept) if is_kept]
        span_parents = None
        if tree is not None:
            place = {-1: 0} | {k: 1 + i for i, k in enumerate(nodes)}
            span_parents = [-1, *(place[tree[k]] for k in nodes)]
        span_tokens = [request.tokens[-1], *(tokens[k] for k in nodes)]
        spans.append(Span(request.id, request.num_cached, span_tokens, span_parents, num_logits=len(span_tokens)))
    return spans
