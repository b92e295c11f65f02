import pytest

from benchmarks import summary
from benchmarks.measure import Run, Sample, Section
from benchmarks.prompts import EncodedPrompt


def sample(contender, group, repeat, seconds, num_tokens=10, domain="math", **reported):
    return Sample(contender, group, repeat, domain, Run([[1] * num_tokens], seconds, **reported))


def test_a_rate_is_all_tokens_over_all_seconds_and_its_median_over_repeats():
    samples = [sample("a", 0, r, seconds) for r, seconds in enumerate((1.0, 2.0, 4.0))]
    samples += [sample("a", 1, r, 1.0, num_tokens=30, domain="code") for r in range(3)]
    section = Section(1, 0.0, 10, {"a": "ours"}, [[EncodedPrompt("math", (1,))]] * 2, samples=samples)
    (row,) = summary.rows(section, [])
    assert (row.rate, row.low, row.high) == (40 / 3, 40 / 5, 40 / 2)
    assert row.by_domain == {"math": 5.0, "code": 30.0}


def test_a_ratio_pairs_prompts_and_ignores_one_disturbed_run():
    base = [sample("b", g, r, 2.0 * (g + 1)) for g in range(4) for r in range(3)]
    fast = [sample("a", g, r, 1.0 * (g + 1)) for g in range(4) for r in range(3)]
    fast[0] = sample("a", 0, 0, 100.0)
    ratio = summary.ratio(fast, base)
    assert ratio == summary.Ratio(2.0, 2.0, 2.0)  # twice as fast on every prompt: no doubt about it


def test_a_ratio_has_an_interval_around_it_only_with_enough_prompts():
    base = [sample("b", g, 0, 1.0) for g in range(6)]
    own = [sample("a", g, 0, 0.5 + 0.1 * g) for g in range(6)]
    ratio = summary.ratio(own, base)
    assert ratio.low < ratio.value < ratio.high
    assert summary.ratio(own, base) == ratio  # the dice have a seed
    assert summary.ratio(own[:2], base[:2]).low is None


def test_acceptance_by_position_counts_only_what_was_read_after_an_accepted_prefix():
    rounds = [(7, 3, 3), (7, 3, 1), (7, 1, 0), (0, 0, 0)]
    a = summary.acceptance([sample("a", 0, 0, 1.0, rounds=[rounds]), sample("a", 0, 1, 1.0, rounds=[rounds])])
    assert a.tau == (4 + 2 + 1 + 1) / 4
    assert a.by_position == [(2, 3), (1, 2), (1, 1)]
    assert a.num_rounds == 4  # a repeat drafts the same again
    assert summary.acceptance([sample("a", 0, 0, 1.0)]) is None


def test_overhead_is_all_but_the_models_and_drafting_without_a_model_is_overhead():
    phases = {"draft": 1.0, "target": 6.0, "verify": 2.0, "between steps": 1.0}
    samples = [sample("a", 0, 0, 10.0, phases=phases, num_steps=10)]
    assert summary.step_time("dspark", samples).overhead == pytest.approx(0.3)
    assert summary.step_time("ngram", samples).overhead == pytest.approx(0.4)
    step = summary.step_time("dspark", samples)
    assert step.total == pytest.approx(1000.0) and step.phases["target"] == pytest.approx(600.0)
    assert summary.step_time("dspark", [sample("a", 0, 0, 1.0)]) is None


def test_texts_past_their_end_are_counted_but_not_those_that_just_reached_it():
    runs = [Run([[5, 2, 5], [5, 5, 2], [5, 5, 5]], 1.0)]
    assert summary.past_their_end([Sample("a", 0, 0, "math", r) for r in runs], {2}) == (1, 3)


def test_the_fastest_of_a_family_is_none_where_it_did_not_take_part():
    rows = [summary.Row(n, f, r, r, r, {}, {}) for n, f, r in (("a", "ours", 1), ("b", "vllm", 2), ("c", "vllm", 3))]
    assert summary.fastest(rows, "vllm").contender == "c"
    assert summary.fastest(rows, "transformers") is None
