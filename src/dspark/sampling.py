"""Logits to a law, and a law to tokens. Draft and target both come through here."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from dspark import noise
from dspark.cards import runs_triton
from dspark.noise import GumbelNoise, uniform
from dspark.transfer import columns_on_device, on_device, together_on_device, together_on_host
from dspark.types import Request, TokenLogprobs


def shape_logits(logits: Tensor, owners: Sequence[Request], previous: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Apply each row's sampling parameters to its logits.

    logits [N, V], owners (N): the request of each row, previous (N): draft tokens between the request's last token and
    the row (only penalties and grammars ask). Returns scores [N, V] float32 and temperature [N, 1]: the law of a row is
    softmax(scores / temperature), at temperature 0 the argmax. Excluded tokens are -inf.
    The order is transformers': bias and penalties, grammar, early ends, temperature, top-k, top-p, min-p.
    """
    scores = logits.float()
    temperature = _column([r.params.temperature for r in owners], logits)
    if not any(r.params.reshapes for r in dict.fromkeys(owners)):  # a request's rows share its parameters
        return scores, temperature
    if any(r.params.logit_bias or r.params.penalises for r in owners):
        scores = _penalise(scores.clone(), owners, previous)
    if any(r.matcher is not None for r in owners):
        scores = scores.masked_fill(~_grammatical(scores, owners, previous), float("-inf"))
    if any(r.params.min_tokens for r in owners):
        scores = _without_early_ends(scores, owners, previous)
    if any(r.params.top_k or r.params.top_p < 1 or r.params.min_p for r in owners):
        scores = _cut(scores, temperature, owners)
    return scores, temperature


def extended(paths: Sequence[Sequence[int]], tokens: Tensor, owners: Sequence[Request]) -> list[list[int]]:
    """paths (N) with their next tokens [N], as `shape_logits` takes them of these owners (N).

    Which tokens they are is asked by penalties and grammars only: without these nobody waits for the device.
    """
    if tokens.device.type == "cpu" or any(r.looks_back for r in owners):
        return [[*path, token] for path, token in zip(paths, tokens.tolist(), strict=True)]
    return [[*path, 0] for path in paths]


def law(scores: Tensor, temperature: Tensor) -> Tensor:
    """[N, V] probabilities of scores [N, V] at temperature [N, 1]; temperature 0 is the one-hot limit.

    Scores that are no numbers have the law of temperature 0: a law is a law, and other requests go on.
    """
    greedy = torch.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)
    sampled = torch.softmax(scores / temperature.clamp_min(1e-6), dim=-1)
    is_law = ~sampled[:, :1].isnan()  # one such score, and the whole row is none
    return torch.where((temperature > 0) & is_law, sampled, greedy)


def token_logprobs(logits: Tensor, chosen: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """What the target itself, with no sampling parameter applied, gave each chosen token. logits [N, V], chosen (N)."""
    logprobs = torch.log_softmax(logits.float(), -1)
    own = logprobs.gather(1, on_device(chosen, logits.device)[:, None])[:, 0]
    values, ids = logprobs.topk(min(num_top, logits.shape[-1]), -1)
    numbers = [x.tolist() for x in together_on_host((own, ids, values)) if x is not None]
    return [
        TokenLogprobs(token, p, tuple(zip(i, v, strict=True))) for token, p, i, v in zip(chosen, *numbers, strict=True)
    ]


class Draws(Protocol):
    """Where randomness comes from. Tests put an enumerator here that takes every branch of the real sampler."""

    def tokens(
        self, scores: Tensor, temperature: Tensor, seeds: Sequence[int], positions: Sequence[int], stream: int
    ) -> Tensor:
        """[N] tokens from softmax(scores [N, V] / temperature [N, 1])."""
        ...

    def accepts(self, probability: float, seed: int, position: int, stream: int) -> bool:
        """True with this probability."""
        ...


class KeyedDraws:
    """Draws that are functions of (seed, position, stream): the Gumbel-max trick over keyed noise."""

    def __init__(self, vocab_size: int, device: torch.device | str = "cpu") -> None:
        self.noise = GumbelNoise(vocab_size, device)
        self._draw = _fused_draw(self.noise.device) if self.noise.device.type == "cuda" else None

    def tokens(
        self, scores: Tensor, temperature: Tensor, seeds: Sequence[int], positions: Sequence[int], stream: int
    ) -> Tensor:
        if self._draw is not None:
            return self._draw(
                scores, temperature, *columns_on_device((_signed(seeds), positions), scores.device), stream
            )
        return _largest(scores, temperature, self._noise(temperature, seeds, positions, stream))

    def noisy(
        self, scores: Tensor, temperature: Tensor, seeds: Sequence[int], positions: Sequence[int], stream: int
    ) -> Tensor:
        """[N, V]  what `tokens` takes the largest of."""
        # Scaling the noise instead of the logits makes greedy decoding the same formula. It is finite: -inf stays out.
        rows = self._noise(temperature, seeds, positions, stream)
        return scores if rows is None else torch.addcmul(scores, temperature, rows)

    def _noise(self, temperature: Tensor, seeds: Sequence[int], positions: Sequence[int], stream: int) -> Tensor | None:
        """[N, V], or None where it is known that nobody samples."""
        asked: Sequence[int | None] = seeds
        if temperature.is_cpu:  # elsewhere one would have to wait
            heats = [heat for (heat,) in temperature.tolist()]
            if not any(heats):
                return None
            asked = [seed if heat else None for seed, heat in zip(seeds, heats, strict=True)]
        return self.noise.rows(asked, positions, stream)

    def accepts(self, probability: float, seed: int, position: int, stream: int) -> bool:
        return uniform(seed, position, stream) < probability


def _fused_draw(device: torch.device) -> Callable[..., Tensor] | None:
    """The Triton kernel that adds noise while it looks for the largest, if the device runs it."""
    return importlib.import_module("dspark.triton_sampling").draw if runs_triton(device) else None


def _signed(seeds: Sequence[int]) -> list[int]:
    """The same 64 bits as a tensor of integers holds them."""
    return [(seed + 2**63) % 2**64 - 2**63 for seed in seeds]


def _largest(scores: Tensor, temperature: Tensor, rows: Tensor | None) -> Tensor:
    """[N]  where scores [N, V], with the noise of rows [N, V] at temperature [N, 1], are largest: the first such place."""
    if noise.largest is not None and scores.is_cpu and scores.dtype == temperature.dtype == torch.float32:
        return noise.largest(scores, rows, None if rows is None else temperature)
    noisy = scores if rows is None else torch.addcmul(scores, temperature, rows)
    # On CPU numpy finds it in a tenth of torch's time.
    return torch.from_numpy(noisy.detach().numpy().argmax(-1)) if noisy.is_cpu else noisy.argmax(-1)


def _penalise(scores: Tensor, owners: Sequence[Request], previous: Sequence[Sequence[int]]) -> Tensor:
    stop = 0
    for _, rows in groupby(owners, key=id):  # a request's rows follow each other
        start, stop = stop, stop + len(list(rows))
        params = owners[start].params
        if params.logit_bias:
            ids = on_device([*params.logit_bias], scores.device)
            scores[start:stop, ids] += on_device([*params.logit_bias.values()], scores.device, scores.dtype)
        if params.penalises:
            _penalise_rows(scores[start:stop], owners[start], previous[start:stop])
    return scores


def _penalise_rows(scores: Tensor, request: Request, previous: Sequence[Sequence[int]]) -> None:
    """Change the scores [n, V] of one request in place, each row after its own path. Only tokens that occur count."""
    params, written, prompt = request.params, Counter(request.generated), request.tokens[: request.num_prompt_tokens]
    seen = list({*request.tokens, *(token for path in previous for token in path)})
    column = {token: index for index, token in enumerate(seen)}
    output = torch.tensor([[float(written[token]) for token in seen]]).repeat(len(scores), 1)
    for row, path in enumerate(previous):
        for token in path:
            output[row, column[token]] += 1
    in_prompt = torch.zeros(len(seen), dtype=torch.bool)
    in_prompt[[column[token] for token in prompt]] = True
    output, in_prompt, ids = together_on_device((output.to(scores.dtype), in_prompt, torch.tensor(seen)), scores.device)
    old = scores[:, ids]
    repeated = torch.where(old > 0, old / params.repetition_penalty, old * params.repetition_penalty)
    new = torch.where((output > 0) | in_prompt, repeated, old)
    scores[:, ids] = new - (params.frequency_penalty * output + params.presence_penalty * (output > 0))


def _grammatical(scores: Tensor, owners: Sequence[Request], previous: Sequence[Sequence[int]]) -> Tensor:
    """[N, V] bool: what each row's grammar allows after its own path."""
    mask = torch.ones(scores.shape, dtype=torch.bool)
    for row, (request, path) in enumerate(zip(owners, previous, strict=True)):
        if request.matcher is not None:
            mask[row] = request.matcher.allowed([*request.generated, *path])
            if not mask[row].any():  # a dead end: what is written ends here
                mask[row, list(request.ending_ids)] = True
    return together_on_device((mask,), scores.device)[0]


def _without_early_ends(scores: Tensor, owners: Sequence[Request], previous: Sequence[Sequence[int]]) -> Tensor:
    """Ending tokens are excluded from rows that come before the request's min_tokens, but where a grammar allows only these."""
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for row, (request, path) in enumerate(zip(owners, previous, strict=True)):
        if len(request.tokens) - request.num_prompt_tokens + len(path) < request.params.min_tokens:
            mask[row, list(request.ending_ids)] = True
    going_on = scores.masked_fill(together_on_device((mask,), scores.device)[0], float("-inf"))
    return torch.where(going_on.isneginf().all(-1, keepdim=True), scores, going_on)


def _column(values: list[float], like: Tensor) -> Tensor:
    return _kept_column(tuple(values), like.device)


@lru_cache(maxsize=64)
def _kept_column(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[N, 1]  for reading only: most steps ask for the same as the one before."""
    return on_device(values, device, torch.float32)[:, None]


def _cut(scores: Tensor, temperature: Tensor, owners: Sequence[Request]) -> Tensor:
    """-inf for what top-k, then top-p, then min-p exclude. Ties with the last token kept stay: no sort decides."""
    params, vocab_size = [r.params for r in owners], scores.shape[-1]
    if any(p.top_k for p in params):
        sizes = [min(p.top_k, vocab_size) for p in params]
        top_k = on_device(sizes, scores.device)[:, None]
        kth = scores.topk(max(sizes)).values.gather(-1, (top_k - 1).clamp_min(0))
        scores = scores.masked_fill((scores < kth) & (top_k > 0), float("-inf"))
    if any(p.top_p < 1 or p.min_p for p in params):
        probs = torch.softmax(scores / temperature.clamp_min(1e-6), dim=-1)
        least = _column([p.min_p for p in params], scores) * probs.amax(-1, keepdim=True)
        if any(p.top_p < 1 for p in params):
            least = torch.maximum(least, _last_in_nucleus(probs, _column([p.top_p for p in params], scores)))
        scores = scores.masked_fill(probs < least, float("-inf"))
    return scores


def _last_in_nucleus(probs: Tensor, top_p: Tensor, num_candidates: int = 256) -> Tensor:
    """[N, 1] probability of the last token that top_p [N, 1] keeps of probs [N, V]; 0 where it is 1.

    Sorting the vocabulary would cost more than all the rest: the few likeliest tokens nearly always hold the mass.
    """
    num_candidates = min(num_candidates, probs.shape[-1])
    ordered = probs.topk(num_candidates).values.double()
    mass = ordered.cumsum(-1)
    num_kept = ((mass - ordered) < top_p).sum(-1, keepdim=True).clamp_min(1)
    last = ordered.gather(-1, num_kept - 1).to(probs.dtype).masked_fill(top_p == 1, 0.0)
    wide = ((mass[:, -1:] < top_p) & (top_p < 1))[:, 0]
    if num_candidates < probs.shape[-1] and bool(wide.any()):  # each row for itself: its law never depends on the batch
        last[wide] = _last_in_nucleus(probs[wide], top_p[wide], 16 * num_candidates)
    return last
