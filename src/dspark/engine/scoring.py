"""What the target makes of a prompt: the log-probability of each of its tokens, for requests that ask."""

from __future__ import annotations

from collections import deque

from dspark.engine.drafting import Drafting
from dspark.sampling import token_logprobs
from dspark.target.target import Target
from dspark.types import FeaturePiece, Request, Span

_MOST_LOGITS = 2**25  # numbers that one forward writes for this: every row of a prompt has its own


class Scoring:
    """Reads prompts for this, before their requests wait for their turn: a chunk in each step, so nobody waits for more.

    max_tokens   of a chunk
    waiting      requests in their order; the first of them may be under way, and hold slots
    busy         those in the forward that runs

    A prefix cache has no part in it, since every position needs its row of logits. All but a prompt's last token is read:
    what follows that is none of the prompt, and a request that is to go on does so from there.
    """

    def __init__(self, target: Target, drafting: Drafting, max_tokens: int) -> None:
        self.waiting: deque[Request] = deque()
        self.busy: list[Request] = []
        self._target, self._drafting = target, drafting
        self._max_tokens = max(1, min(max_tokens, _MOST_LOGITS // target.vocab_size))

    @property
    def is_under_way(self) -> bool:
        """Whether requests hold slots from one step to the next."""
        return any(request.num_cached for request in self.waiting)

    def step(self, num_kept: int, feature_layers: tuple[int, ...]) -> list[Request]:
        """Read the next chunk, and leave `num_kept` slots free; the requests that are done with it."""
        spans = self._spans(self._target.num_free_slots - num_kept)
        if spans:
            self._read(spans, feature_layers)
        done = []
        while self.waiting and (self.waiting[0].finish_reason is not None or _num_left(self.waiting[0]) == 0):
            request = self.waiting.popleft()
            done += [request] if request.finish_reason is None else []
        self.busy = []
        return done

    def set_aside(self) -> None:
        """Give back every slot: who was under way begins anew."""
        for request in self.waiting:
            if request.num_cached:
                self._target.release(request.id)
                self._drafting.forget(request)
                request.num_cached, request.prompt_logprobs = 0, []

    def _spans(self, num_free: int) -> list[Span]:
        """What is read next, of as many prompts as fit a chunk. Who decodes needs slots first."""
        spans, room, self.busy = [], self._max_tokens, []
        for request in self.waiting:
            left = _num_left(request) if request.finish_reason is None else 0
            if left > num_free:
                if request.num_cached:
                    self.set_aside()
                    return []
                break  # its turn comes when others have ended
            tokens = request.pending[: min(left, room)]
            num_free, room = num_free - left, room - len(tokens)
            if tokens:
                self.busy.append(request)
                spans.append(Span(request.id, request.num_cached, tokens, num_logits=len(tokens)))
            if not room:
                break
        return spans

    def _read(self, spans: list[Span], feature_layers: tuple[int, ...]) -> None:
        out = self._target.extend(spans, feature_layers)
        first = 0
        for request, span in zip(self.busy, spans, strict=True):
            start, num_read, num_top = span.start, len(span.tokens), request.params.prompt_logprobs
            assert num_top is not None
            following = request.tokens[start + 1 : start + 1 + num_read]  # a row is about the token after its own
            request.prompt_logprobs += token_logprobs(out.logits[first : first + num_read], following, num_top)
            request.num_cached += num_read
            if out.features is not None:
                self._drafting.keep_features(request, FeaturePiece(out.features, first, num_read))
            first += num_read


def _num_left(request: Request) -> int:
    return request.num_prompt_tokens - 1 - request.num_cached
