from benchmarks.claims import DSPARK, Result, aims, losses
from benchmarks.contenders import PLAIN
from benchmarks.lineup import OurChoice
from benchmarks.measure import Section
from benchmarks.report import drafter_of
from benchmarks.summary import Acceptance, Row, StepTime


def result(rates, num_requests=1, temperature=0.0, speculative=(), **reported):
    families = {name: name.split(":")[0].split()[0] for name in rates}
    section = Section(num_requests, temperature, 10, families, [], frozenset(speculative))
    rows = [Row(name, families[name], rate, rate, rate, {}, {}) for name, rate in rates.items()]
    return Result(section, rows, reported.get("acceptance", {}), reported.get("step_times", {}))


def test_losses_name_every_peer_that_is_faster_and_by_how_much():
    r = result(
        {PLAIN: 100, DSPARK: 300, "transformers greedy": 120, "vllm compiled-ngram": 400, "vllm eager": 90},
        speculative=["vllm compiled-ngram", DSPARK],
    )
    assert losses([r]) == [
        "1 request, temperature 0: ours: plain is slower than transformers greedy, 100 against 120 tok/s (0.83x)",
        "1 request, temperature 0: ours: dspark is slower than vllm compiled-ngram, 300 against 400 tok/s (0.75x)",
    ]


def test_a_drafter_of_ours_that_slows_us_down_is_a_loss_too():
    assert losses([result({PLAIN: 100, "ours: self": 80})]) == [
        "1 request, temperature 0: ours: self is slower than ours: plain, 80 against 100 tok/s (0.80x)"
    ]
    assert losses([result({PLAIN: 100, DSPARK: 250, "transformers greedy": 90})]) == []


def test_aims_are_judged_against_the_best_of_each_family():
    r = result(
        {PLAIN: 100, DSPARK: 300, "transformers greedy": 90, "transformers lookup": 110, "vllm a": 100, "vllm b": 125},
        speculative=["transformers lookup"],
        step_times={DSPARK: StepTime({"target": 1.0}, 0.2, 5)},
    )
    judged = {line.partition(": ")[2]: reached for reached, line in aims([r])}
    assert judged == {
        "DSpark over our plain decoding: 3.00x, aim 2x": True,
        "DSpark over transformers' best (transformers lookup): 2.73x, aim 3x": False,
        "overhead of a DSpark step 20%, aim at most 15%": False,
        "DSpark over vLLM's best (vllm b): 2.40x, aim 2.5x": False,
        "our plain decoding over transformers' best greedy generate: 1.11x, aim 1x": True,
    }


def test_aims_are_judged_for_every_scheduler():
    r = result({PLAIN: 100, DSPARK: 170, f"{DSPARK}@fixed:7": 210, "ours: ngram": 120})
    assert aims([r]) == [
        (False, "1 request, temperature 0: DSpark over our plain decoding: 1.70x, aim 2x"),
        (True, "1 request, temperature 0: DSpark@fixed:7 over our plain decoding: 2.10x, aim 2x"),
    ]


def test_tau_is_judged_at_temperature_1_only():
    accepted = {DSPARK: Acceptance(2.6, {}, [], 9), "ours: dflash": Acceptance(2.7, {}, [], 9)}
    at = {t: aims([result({DSPARK: 1}, temperature=t, acceptance=accepted)]) for t in (0.0, 1.0)}
    assert at[0.0] == []
    assert [reached for reached, _ in at[1.0]] == [True, False]


def test_drafters_are_written_with_a_folder_and_a_scheduler_of_their_own():
    assert OurChoice.parse("none") == OurChoice(PLAIN, "none", "")
    assert OurChoice.parse("dspark=some/folder@threshold:0.6") == OurChoice(
        "ours: dspark@threshold:0.6", "some/folder", "threshold:0.6"
    )
    assert [drafter_of(n) for n in (PLAIN, "ours: ngram", "ours: dspark@fixed:3")] == ["none", "ngram", "dspark"]
