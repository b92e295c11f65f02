"""Who runs. Slots are counted before a step begins, so a step never fails for lack of them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from dspark.types import Request, Span


def is_reading(request: Request) -> bool:
    """Whether the target still has to read more than the anchor: a new prompt, or everything after a preemption."""
    num_tokens = len(request.tokens)
    return num_tokens > request.num_cached + 1 or num_tokens == request.num_prompt_tokens


@dataclass
class Batcher:
    """First come, first served; the youngest goes back to the queue when slots run out.

    max_running  requests in one step at most
    max_tokens   tokens in one forward that prompts may fill up to; decoding is never held back
    lookahead    slots a decoding request needs in one step: its anchor and the longest draft
    """

    max_running: int
    max_tokens: int
    lookahead: int
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)

    def admit(self, num_free: int) -> list[Request]:
        """Let waiting requests in while there are slots for all their tokens besides what the running ones may take."""
        admitted: list[Request] = []
        if not self.waiting:
            return admitted
        promised = self._promised
        while (need := self._need_of_next(num_free - promised)) is not None:
            promised += need
            admitted.append(self.waiting.popleft())
            self.running.append(admitted[-1])
        return admitted

    def could_admit(self, num_free: int) -> bool:
        """Whether `admit` would let anybody in."""
        return bool(self.waiting) and self._need_of_next(num_free - self._promised) is not None

    def preempt(self, num_free: int) -> Request | None:
        """Take the youngest request out if this step may not fit; it waits first in line. The caller frees its slots.

        One at a time, because slots that it shares with others do not become free. A request that is alone fits, unless
        another engine has slots of the same cache.
        """
        if not self.running or self.need() <= num_free:
            return None
        self.waiting.appendleft(self.running.pop())
        return self.waiting[0]

    def prompt_spans(self, num_decoding_tokens: int) -> list[tuple[Request, Span]]:
        """The next chunk of each prompt, within what decoding leaves of a step; logits only where a prompt ends."""
        # However many requests are decoding, prompts go on: a quarter of the allowance is theirs.
        left = max(self.max_tokens - num_decoding_tokens, self.max_tokens // 4, 1)
        spans = []
        for request in self.running:
            if is_reading(request) and left > 0:
                chunk = request.pending[:left]
                left -= len(chunk)
                ends = len(chunk) == len(request.pending)
                spans.append((request, Span(request.id, request.num_cached, chunk, num_logits=int(ends))))
        return spans

    def need(self) -> int:
        """Slots that the running requests may take in one step."""
        return sum(min(len(r.pending), self.max_tokens) if is_reading(r) else self.lookahead for r in self.running)

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it is."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    @property
    def _promised(self) -> int:
        """Slots that the running requests may take."""
        return sum(len(r.tokens) - r.num_cached - 1 + self.lookahead for r in self.running)

    def _need_of_next(self, num_free: int) -> int | None:
        """Slots of the first that waits; None: nobody does, or there are too few, or too many run already."""
        if not self.waiting or len(self.running) >= self.max_running:
            return None
        need = len(self.waiting[0].pending) - 1 + self.lookahead
        return need if need <= num_free else None
