"""The queue of one server: textbook limits in closed form, and a simulation of its steps with known parameters."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from dspark.monitor.replica import Replica


def erlang_c(num_servers: int, load: float) -> float:
    """Chance to wait in an M/M/c queue with `load` = arrivals times service time."""
    terms = [load**k / math.factorial(k) for k in range(num_servers)]
    last = load**num_servers / math.factorial(num_servers) * num_servers / (num_servers - load)
    return last / (sum(terms) + last)


def textbook(num_servers: int, seconds: float = 1.0) -> Replica:
    """Short passes that take as long however many requests there are, and prompts that cost no more."""
    n = np.ones(num_servers)
    return Replica(seconds / 1000 * n, 998.5 * n, 0 * n, output_tokens=2, max_waiting=2000)


@pytest.mark.parametrize("load", [0.3, 0.8])
def test_one_at_a_time_is_mm1(load):
    service = textbook(1).at(load, math.inf, math.inf)
    assert service.running + service.waiting == pytest.approx(load / (1 - load), rel=1e-6)
    # The gamma distributed waiting time of M/M/1: P(wait > t) = load e^(-(1 - load) t); one more pass is reading.
    kept = textbook(1).at(load, 0.001 + 2.5, math.inf).ttft_kept
    assert kept == pytest.approx(1 - load * math.exp(-(1 - load) * 2.5), rel=1e-6)


def test_side_by_side_without_slowing_each_other_is_mmc():
    service = textbook(4).at(3.0, math.inf, math.inf)
    assert service.waiting == pytest.approx(erlang_c(4, 3.0) * 3.0 / (4 - 3.0), rel=1e-6)
    assert service.running == pytest.approx(3.0, rel=1e-6)


def test_beyond_saturation_the_queue_refuses_what_it_cannot_serve():
    service = textbook(2).at(5.0, 1.0, 10.0)
    assert service.refused == pytest.approx(1 - 2 / 5, abs=0.01)
    assert service.per_token_kept == pytest.approx(2 / 5, abs=0.01)


def batching(num_requests: int = 16) -> Replica:
    """Passes get dearer with requests, drafts get shorter, prompts stall everybody."""
    n = np.arange(1, num_requests + 1)
    return Replica(
        pass_seconds=0.02 + 0.002 * n,
        passes=40 + 1.0 * n,
        prompt_seconds=np.full(num_requests, 0.03),
        output_tokens=101,
    )


def simulated(replica: Replica, rate: float, num_requests: int, seed: int = 0) -> tuple[list[float], list[float]]:
    """Step by step with Poisson arrivals and uneven lengths: (TTFT, seconds per token) of each request."""
    rng = random.Random(seed)
    arrivals, now = [], 0.0
    for _ in range(num_requests):
        now += rng.expovariate(rate)
        arrivals.append(now)
    waiting = list(reversed(arrivals))
    # Work is counted in units of a mean request, so that passes may differ with the batch.
    running: list[list[float]] = []  # [work left, work, first token at]
    ttft, per_token, now = [], [], 0.0
    while waiting or running:
        if not running and waiting[-1] > now:
            now = waiting[-1]
        joining = []
        while waiting and waiting[-1] <= now and len(running) + len(joining) < len(replica.pass_seconds):
            joining.append(waiting.pop())
        n = len(running) + len(joining)
        now += replica.pass_seconds[n - 1] + len(joining) * replica.prompt_seconds[n - 1]
        for request in running:
            request[0] -= 1 / replica.passes[n - 1]
        for done in [r for r in running if r[0] <= 0]:
            running.remove(done)
            per_token.append((now - done[2]) / (done[1] * (replica.output_tokens - 1)))
        for arrival in joining:
            work = rng.uniform(0.4, 1.6)
            ttft.append(now - arrival)
            running.append([work, work, now])
    return ttft, per_token


@pytest.mark.parametrize(
    ("ttft", "per_token", "share"),
    [(0.15, math.inf, 0.9), (math.inf, 0.025, 0.9), (1.0, 0.05, 0.9), (0.2, math.inf, 0.98), (1.0, 0.03, 0.98)],
)
def test_highest_rate_is_within_a_tenth_of_a_simulation(ttft, per_token, share):
    replica = batching()
    predicted = replica.highest_rate(ttft, per_token, share)

    def kept(rate: float) -> float:
        first, later = simulated(replica, rate, 4000)
        return min(np.mean(np.array(first) <= ttft), np.mean(np.array(later) <= per_token))

    assert 0 < predicted < replica.saturation
    assert kept(0.9 * predicted) >= share > kept(1.1 * predicted)


@pytest.mark.parametrize("prompt_seconds", [0.012, 0.06])
@pytest.mark.parametrize("load", [0.5, 0.7, 0.85])
def test_first_tokens_come_as_late_as_in_a_simulation(prompt_seconds, load):
    n = np.arange(1, 33)
    replica = Replica(0.02 + 0.0021 * n, np.full(32, 25.0), np.full(32, prompt_seconds), output_tokens=64)
    rate = load * replica.saturation
    first, _ = simulated(replica, rate, 8000)
    for share in (0.5, 0.9, 0.99):
        seconds = float(np.quantile(first, share))
        assert replica.at(rate, 0.8 * seconds, math.inf).ttft_kept < share, "not much sooner"
        if share < 0.99 or load < 0.85:  # where a queue begins the last ones are expected later than they come
            assert replica.at(rate, 1.25 * seconds, math.inf).ttft_kept > share, "nor later"


def test_uneven_requests_keep_the_objective_less_often():
    n = np.ones(4)
    even = Replica(0.02 * n, 50 * n, 0 * n, output_tokens=101)
    uneven = Replica(0.02 * n, 50 * n, 0 * n, output_tokens=101, spread=(0.5, 0.5, 1.0, 2.0))
    assert even.at(0.1, 1.0, 0.011).per_token_kept == pytest.approx(1.0)
    assert uneven.at(0.1, 1.0, 0.011).per_token_kept == pytest.approx(0.75)
    assert uneven.highest_rate(1.0, 0.011, share=0.99) == 0


def test_saturation_is_what_a_full_batch_finishes():
    replica = batching()
    ttft, _ = simulated(replica, 100.0, 3000)
    finished_per_second = 3000 / max(ttft)  # everybody came at about 0
    assert finished_per_second == pytest.approx(replica.saturation, rel=0.05)
