import random

import pytest

from dspark.monitor.canaries import Outcome
from dspark.monitor.drift import THRESHOLD, Cusum, Drift
from dspark.types import Round, SamplingParams
from monitor.records import finished


def run_length(shift: float, seed: int, most: int) -> int:
    """Batches until an alarm, when batch means lie `shift` standard errors below the reference from then on."""
    rng = random.Random(seed)
    cusum = Cusum(batch=1, num_reference=40)
    for _ in range(40):
        cusum.add(0.7 + 0.05 * rng.gauss(0, 1))
    for n in range(1, most + 1):
        cusum.add(0.7 + 0.05 * (rng.gauss(0, 1) - shift))
        if cusum.low > THRESHOLD:
            return n
    return most


def test_false_alarms_are_rare_and_shifts_are_found_soon():
    clean = [run_length(0.0, seed, 3000) for seed in range(40)]
    assert sum(n < 3000 for n in clean) <= 8  # over 12,000 batches in between, on average
    assert sum(run_length(2.0, seed, 3000) for seed in range(40)) / 40 < 12


def test_nothing_is_said_before_there_is_a_reference():
    cusum = Cusum(batch=5, num_reference=4)
    counted = [cusum.add(float(i % 2)) for i in range(25)]
    assert counted.index(True) == 24 and cusum.mean == pytest.approx(0.5, abs=0.11)


def record(share: float, rng: random.Random, temperature: float = 0.0):
    rounds = [Round(5, 5, int(rng.random() < share)) for _ in range(20)] + [Round(0, 0, 0)]
    return finished(rounds=rounds, params=SamplingParams(temperature=temperature))


def test_a_fall_in_one_class_is_told_once_and_again_after_it_recovered():
    alarms, rng = [], random.Random(1)
    drift = Drift(lambda signal, name, cusum: alarms.append((signal, name)), batch=20, num_reference=20)
    for _ in range(60):
        drift.request(record(0.8, rng))
        drift.request(record(0.5, rng, temperature=1.0))
    assert not alarms
    for _ in range(60):
        drift.request(record(0.3, rng))
        drift.request(record(0.5, rng, temperature=1.0))
    assert alarms == [("first_token_acceptance", "greedy")]
    for _ in range(6000):
        drift.request(record(0.95, rng))
        if not drift.acceptance["greedy"].low:
            break
    for _ in range(60):
        drift.request(record(0.3, rng))
    assert alarms == [("first_token_acceptance", "greedy")] * 2


def test_the_targets_own_opinion_is_watched_both_ways():
    for shifted in (-3.0, -0.5):
        alarms, rng = [], random.Random(2)
        drift = Drift(lambda signal, name, cusum, seen=alarms: seen.append((signal, name)), batch=10, num_reference=20)
        for n in range(120):
            logprob = (-1.5 if n < 40 else shifted) + 0.1 * rng.gauss(0, 1)
            drift.canary(Outcome("equal", finished(), [], logprob=logprob))
        drift.canary(Outcome("abandoned", finished(), []))
        assert alarms == [("target_logprob", "sampled")]
