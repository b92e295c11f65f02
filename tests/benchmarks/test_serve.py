from __future__ import annotations

from benchmarks.serve_loads import Load, closed, own, sampled
from dspark import Engine, load_drafter, load_target
from serve.conftest import serving

TEXTS = ["What is a river?", "Hi", "What does the word cold mean?"]


def test_all_sides_do_the_same_work() -> None:
    target = load_target("tiny", dtype="float32", device="cpu")
    engine = Engine(target, load_drafter("dspark", target), "fixed:7")
    alone = own(engine, TEXTS, clients=2, tokens=12)
    with serving(Engine(target, load_drafter("dspark", target), "fixed:7")) as served:
        ours = closed("server", served.url, 2, sampled(TEXTS, 12))
    same = own(engine, TEXTS, clients=2, tokens=12, arrivals=ours.arrivals)
    for load in (alone, ours, same):
        assert (load.num_tokens, load.num_failed, len(load.first_token)) == (36, 0, 3)
        assert min(load.gaps + load.first_token) > 0
        assert load.arrivals == sorted(load.arrivals)
    for load in (alone, ours):
        assert sum(load.gaps + load.first_token) < load.clients * load.seconds
    assert len(alone.gaps) >= len(ours.gaps)  # an event may carry no new character
    assert same.arrivals == ours.arrivals


def test_requests_wait_for_their_time() -> None:
    target = load_target("tiny", dtype="float32", device="cpu")
    load = own(Engine(target), TEXTS, clients=1, tokens=2, arrivals=[0.0, 0.0, 0.3])
    assert load.seconds > 0.3 and load.num_tokens == 6


def test_times_are_from_each_requests_arrival() -> None:
    load = Load("any", 2)
    first, second = load.arrive(1.0), load.arrive(2.0)
    for events, at in ((second, 5.0), (first, 5.5), (second, 6.0)):
        events.append(at)
    assert (load.first_token, load.gaps) == ([4.5, 3.0], [1.0])
