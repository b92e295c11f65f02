from __future__ import annotations

from benchmarks.serve import closed, own, sampled
from dspark import Engine, load_drafter, load_target
from serve.conftest import serving

TEXTS = ["What is a river?", "Hi", "What does the word cold mean?"]


def test_both_sides_do_the_same_work() -> None:
    target = load_target("tiny", dtype="float32", device="cpu")
    engine = Engine(target, load_drafter("dspark", target), "fixed:7")
    alone = own(engine, TEXTS, clients=2, tokens=12)
    with serving(Engine(target, load_drafter("dspark", target), "fixed:7")) as served:
        ours = closed("server", served.url, 2, sampled(TEXTS, 12))
    for load in (alone, ours):
        assert (load.num_tokens, load.num_failed, len(load.first_token)) == (36, 0, 3)
        assert min(load.gaps + load.first_token) > 0
        assert sum(load.gaps + load.first_token) < load.clients * load.seconds
    assert len(alone.gaps) >= len(ours.gaps)  # an event may carry no new character
