from __future__ import annotations

import pytest

from dspark.engine.admission import Admission
from dspark.errors import QueueFull


def refused(admission: Admission) -> int:
    with pytest.raises(QueueFull) as error:
        admission.take(admission.max_running + admission.max_waiting - admission.num_open + 1)
    return error.value.retry_seconds


def test_who_is_refused_comes_back_when_half_of_the_queue_has_gone():
    admission = Admission(max_running=4, max_waiting=40)
    admission.take(44)
    for n in range(40):  # one a second, in the order they came: the last ones waited longest
        admission.end(arrival=0.0, now=float(n + 1))
        admission.take(1)
    assert 10 <= refused(admission) <= 20


def test_an_idle_hour_says_nothing_of_a_queue():
    admission = Admission(max_running=4, max_waiting=40)
    for start in (0.0, 3600.0, 7200.0):
        admission.take(1)
        admission.end(arrival=start, now=start + 0.4)
    assert refused(admission) == 2  # four at a time, 0.4 s each, twenty before it


def test_without_experience_it_is_a_second_and_never_more_than_a_minute():
    admission = Admission(max_running=1, max_waiting=100)
    assert refused(admission) == 1
    admission.take(1)
    admission.end(arrival=0.0, now=1000.0)
    assert refused(admission) == 60
