"""What the target makes of a prompt: the log-probability of each of its tokens, for requests that ask."""

from __future__ import annotations

from collections import deque

from dspark.sampling import token_logprobs
from dspark.target.target import Target
from dspark.types import Request, Span

_MOST_LOGITS = 2**25  # numbers that one forward writes for this: every row of a prompt has its own


class Scoring:
    """Prompts are read once for this, apart from decoding, before their requests wait for their turn.

    A prefix cache has no part in it, since every position needs its row of logits. Whole prompts at a time, several
    where they fit one forward: nothing is held from one step to the next.
    """

    def __init__(self, target: Target, max_tokens: int) -> None:
        self.waiting: deque[Request] = deque()
        self.busy: list[Request] = []
        self._target, self._max_tokens = target, max(1, min(max_tokens, _MOST_LOGITS // target.vocab_size))

    def step(self) -> list[Request]:
        """Read the prompts whose turn it is; the requests that are done with it."""
        self.busy = []
        self._take_up()
        longest = max((r.num_prompt_tokens for r in self.busy), default=0)
        for start in range(0, longest, self._max_tokens):
            self._read(start)
        for request in self.busy:
            self._target.release(request.id)
        done, self.busy = self.busy, []
        return done

    def _take_up(self) -> None:
        num_free, room = self._target.num_free_slots, self._max_tokens
        while self.waiting:
            request = self.waiting[0]
            if request.finish_reason is None:
                need = request.num_prompt_tokens
                if need > num_free or (self.busy and need > room):
                    return  # its turn comes when others have ended
                num_free, room = num_free - need, room - need
                request.prompt_logprobs = []
                self.busy.append(request)
            self.waiting.popleft()

    def _read(self, start: int) -> None:
        stop = start + self._max_tokens
        chunks = [(r, r.tokens[start : min(stop, r.num_prompt_tokens)]) for r in self.busy]
        spans = [Span(r.id, start, tokens, num_logits=len(tokens)) for r, tokens in chunks]
        rows = self._target.extend(spans).logits.split([len(tokens) for _, tokens in chunks])
        for (request, _), own in zip(chunks, rows, strict=True):
            num_top = request.params.prompt_logprobs
            assert num_top is not None
            # A row is about the token after its own; the last one's is not part of the prompt.
            following = request.tokens[start + 1 : min(stop + 1, request.num_prompt_tokens)]
            if following:
                request.prompt_logprobs += token_logprobs(own[: len(following)], following, num_top)
