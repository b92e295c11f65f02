"""One server under Poisson arrivals: how long requests wait, how fast they are written, and the rate it can take.

A birth-death chain over the number of requests in the server. With n of them decoding, a request leaves after its share
of the passes of n and every arrival delays all by the reading of its prompt; beyond the limit they queue. Speeds depend
on n through measured curves, so there is nothing to fit. With short passes that do not slow each other down it is the
textbook's M/M/c, which the tests check; batches are checked against a simulation of the steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dspark.errors import InvalidRequest

Floats = NDArray[np.float64]
_BISECTIONS = 24
_MOST_OTHERS = 8  # arrivals during one pass, and prompts in it, that are told apart
_MOST_READING = 0.95  # share of the time that may go into prompts


@dataclass(frozen=True)
class Service:
    """What requests get at one rate. Shares are of all requests; a refused one keeps no objective."""

    rate: float
    ttft_kept: float
    per_token_kept: float
    refused: float
    running: float
    waiting: float
    ttft_seconds: float  # mean
    per_token_seconds: float  # mean


@dataclass(frozen=True)
class Replica:
    """A server by what it takes when n = 1 .. N requests are decoded together; N is the most it decodes.

    pass_seconds    [N]  one target pass, drafting included
    passes          [N]  passes of a request after its first token, on average
    prompt_seconds  [N]  what the reading of one request's prompt adds to them
    prompt_passes   passes over which a prompt is read
    output_tokens   per request
    max_waiting     requests that may queue; more are refused
    spread          [m]  passes of equally many requests relative to the average one; mean 1
    """

    pass_seconds: Floats
    passes: Floats
    prompt_seconds: Floats
    output_tokens: float
    prompt_passes: int = 1
    max_waiting: int = 256
    spread: tuple[float, ...] = (1.0,)

    @property
    def departures(self) -> Floats:
        """[N]  requests finished per second while n are being decoded and as many arrive."""
        n = np.arange(1, len(self.pass_seconds) + 1)
        # Its place is taken while its prompt is read, too, and until the end of its last pass, half of it unused on average.
        taken = self.prompt_passes + self.passes + 0.5
        seconds: Floats = 1 / (taken * self.pass_seconds / n + self.prompt_seconds)
        return seconds

    @property
    def saturation(self) -> float:
        """Requests per second that it finishes at most, however long they wait."""
        return float(self.departures[-1])

    def presence(self, rate: float) -> Floats:
        """[N + max_waiting + 1]  share of time with 0, 1, … requests in the server; also what an arrival finds."""
        per_state = np.concatenate([self.departures, np.full(self.max_waiting, self.saturation)])
        logs = np.concatenate([[0.0], np.cumsum(np.log(rate / per_state))])
        shares = np.exp(logs - logs.max())
        present: Floats = shares / shares.sum()
        return present

    def at(self, rate: float, ttft_seconds: float, per_token_seconds: float) -> Service:
        """Service at `rate` requests per second, judged by these two objectives."""
        if not rate > 0:
            raise InvalidRequest(f"the rate must be above 0 requests per second; got {rate}")
        limit, present = len(self.pass_seconds), self.presence(rate)
        found = present[:-1]  # by those let in
        joined = np.minimum(np.arange(len(found)), limit - 1)  # index of the batch it is part of
        per_token = self._per_token(rate)[joined]
        spread = np.array(self.spread)
        kept = (per_token[:, None] * spread <= per_token_seconds).mean(1)
        waiting = np.maximum(0, np.arange(len(present)) - limit)
        return Service(
            rate=rate,
            ttft_kept=float(found @ self._ttft_kept(rate, ttft_seconds)),
            per_token_kept=float(found @ kept),
            refused=float(present[-1]),
            running=float(present @ np.minimum(np.arange(len(present)), limit)),
            waiting=float(present @ waiting),
            ttft_seconds=float(found @ self._ttft(rate)) / float(found.sum()),
            per_token_seconds=float(found @ per_token) * float(spread.mean()) / float(found.sum()),
        )

    def highest_rate(self, ttft_seconds: float, per_token_seconds: float, share: float = 0.99) -> float:
        """Requests per second at which `share` of them still keep each objective; 0 where an empty server does not."""
        low, high = 0.0, self.saturation
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            service = self.at(middle, ttft_seconds, per_token_seconds)
            is_kept = min(service.ttft_kept, service.per_token_kept) >= share
            low, high = (middle, high) if is_kept else (low, middle)
        return low if low > self.saturation * 1e-6 else 0.0

    def _per_token(self, rate: float) -> Floats:
        """[N]  seconds per token after the first one, the reading of others' prompts included."""
        arrivals = np.minimum(rate, self.departures)
        passing: Floats = self.pass_seconds / (1 - arrivals * self.prompt_seconds)
        return passing * self.passes / max(1.0, self.output_tokens - 1)

    def _reading(self, others: int = 0) -> Floats:
        """[N]  seconds from the first pass with a request's prompt in it to its first token, with so many others' prompts."""
        seconds: Floats = self.prompt_passes * self.pass_seconds + (1 + others) * self.prompt_seconds
        return seconds

    def _met(self, rate: float) -> Iterator[tuple[Floats, Floats, int]]:
        """([N] chance, [N] seconds, others) by requests found, 0 .. N - 1: how long the pass under way takes, whose end an
        arrival waits for, and how many came during it, whose prompts are read with its own.
        """
        usual, prompt = (np.concatenate([[0.0], x[:-1]]) for x in (self.pass_seconds, self.prompt_seconds))
        mean = usual / (1 - np.minimum(rate * prompt, _MOST_READING))
        # Longer passes are met more often than there are.
        lengths = [usual + k * prompt / self.prompt_passes for k in range(_MOST_OTHERS)]
        met = [_poisson(self.prompt_passes * rate * mean, k) * seconds for k, seconds in enumerate(lengths)]
        for k, seconds in enumerate(lengths):
            share = met[k] / np.maximum(sum(met), 1e-12)
            share[0] = k == 0  # who finds nobody waits for nothing
            for others in range(_MOST_OTHERS):
                yield share * _poisson(rate * seconds, others), seconds, others

    def _ttft(self, rate: float) -> Floats:
        """[N + max_waiting]  mean seconds to the first token by requests found."""
        at_once = np.zeros(len(self.pass_seconds))
        for chance, seconds, others in self._met(rate):
            at_once += chance * (seconds / 2 + self._reading(others))
        queued = np.arange(1, self.max_waiting + 1) / self.saturation + self._reading()[-1]
        return np.concatenate([at_once, queued])

    def _ttft_kept(self, rate: float, objective: float) -> Floats:
        """[N + max_waiting]  chance to keep the objective by requests found."""
        at_once = np.zeros(len(self.pass_seconds))
        for chance, seconds, others in self._met(rate):
            left = objective - self._reading(others)
            at_once += chance * np.clip(left / np.maximum(seconds, 1e-12), 0.0, 1.0)
        # Those who find it full wait until enough have left: a gamma distributed time.
        turns = torch.arange(1, self.max_waiting + 1, dtype=torch.float64)
        time = torch.full_like(turns, max(0.0, objective - float(self._reading()[-1])) * self.saturation)
        return np.concatenate([at_once, torch.special.gammainc(turns, time).numpy()])


def _poisson(mean: Floats, k: int) -> Floats:
    chance: Floats = np.exp(-mean) * mean**k / math.factorial(k)
    return chance
