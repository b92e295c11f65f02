from __future__ import annotations

from benchmarks.serve_added import Added, RequestLog
from benchmarks.serve_loads import Load, closed, own, sampled
from dspark import Engine, load_drafter, load_target
from dspark.monitor.request_log import RequestLog as Log
from serve.conftest import serving

TEXTS = ["What is a river?", "Hi", "What does the word cold mean?"]


def test_both_sides_do_the_same_work_and_what_http_adds_is_a_part_of_it(tmp_path) -> None:
    target = load_target("tiny", dtype="float32", device="cpu")
    alone = own(Engine(target, load_drafter("dspark", target), "fixed:7"), TEXTS, clients=2, tokens=12)
    log = Log(tmp_path / "log")
    options = {"on_finished": [log.request], "at_end": [log.close]}
    with serving(Engine(target, load_drafter("dspark", target), "fixed:7"), options) as served:
        ours = closed("server", served.url, 2, sampled(TEXTS, 12))
    for load in (alone, ours):
        assert (load.num_tokens, load.num_failed, len(load.first_token)) == (36, 0, 3)
        assert min(load.gaps + load.first_token) > 0
        assert load.arrivals == sorted(load.arrivals)
        assert sum(load.gaps + load.first_token) < load.clients * load.seconds
    assert len(alone.gaps) >= len(ours.gaps)  # an event may carry no new character
    added = Added()
    added.add(ours, RequestLog(tmp_path / "log").next(3), alone.tokens, target.tokenizer)
    assert len(added.first_token) == 3 and added.num_left_out == 0
    assert min(added.first_token + added.until_socket) > 0
    assert all(part <= whole for part, whole in zip(added.until_socket, added.events, strict=True))
    assert max(added.first_token) < max(ours.first_token)


def test_what_is_added_lies_before_the_engine_and_behind_its_steps() -> None:
    load, added, tokenizer = Load("server", 2, began=100.0), Added(), load_target("tiny").tokenizer
    steps, (letter,) = {"arrived": 101.5, "steps": [[103.0, 1], [103.75, 1], [104.0, 2]]}, tokenizer("a")["input_ids"]
    tokens = [letter, tokenizer.eos_token_id, letter, letter]  # the second step writes no text, so no event follows
    for seed, sent, events in ((5, 1.0, [3.25, 4.5]), (6, 2.0, [3.0])):
        load.arrive(sent, seed).extend(events)
        load.at_socket[-1].extend(at - 0.125 for at in events)
    added.add(load, [{"seed": 6, **steps}, {"seed": 5, **steps}], {5: tokens, 6: tokens}, tokenizer)
    assert added.first_token == [0.5 + 0.25]  # 5's; that 3 follows 2 is the engine's doing
    assert added.events == [0.25, 0.5]
    assert added.until_socket == [0.125, 0.375]
    assert added.num_left_out == 1  # 6 had two steps with text and one event


def test_a_log_is_read_on_from_where_it_was_left(tmp_path) -> None:
    (tmp_path / "log").write_text('{"seed": 1}\n{"seed": 2}\n')
    log = RequestLog(tmp_path / "log")
    assert log.next(2) == [{"seed": 1}, {"seed": 2}]
    with (tmp_path / "log").open("a") as file:
        file.write('{"seed": 3}\n')
    assert log.next(1) == [{"seed": 3}]


def test_a_client_asks_again_after_its_answer() -> None:
    target = load_target("tiny", dtype="float32", device="cpu")
    load = own(Engine(target), TEXTS, clients=1, tokens=2)
    assert load.num_tokens == 6 and load.arrivals[1] > load.events[0][-1]


def test_times_are_from_each_requests_arrival() -> None:
    load = Load("any", 2)
    first, second = load.arrive(1.0), load.arrive(2.0)
    for events, at in ((second, 5.0), (first, 5.5), (second, 6.0)):
        events.append(at)
    assert (load.first_token, load.gaps) == ([4.5, 3.0], [1.0])
