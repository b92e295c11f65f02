from collections import Counter

import pytest

from benchmarks.measure import Run, Section, check_equal_work, measure, turn_order
from benchmarks.prompts import EncodedPrompt


class Scripted:
    """Writes the number of its calls, over and over; never slower than it says."""

    family, max_requests, is_speculative = "ours", 8, False

    def __init__(self, name, diary):
        self.name, self.diary = name, diary

    def run(self, prompts, num_tokens, temperature, seed):
        self.diary.append((self.name, tuple(prompts[0]), seed))
        return Run([[7] * num_tokens for _ in prompts], seconds=0.5)

    def close(self):
        pass


def section(contenders, num_groups=2):
    groups = [[EncodedPrompt("math", (g,))] for g in range(num_groups)]
    return Section(1, 0.0, 4, {c.name: c.family for c in contenders}, groups)


def test_everyone_reads_every_prompt_in_every_repeat_and_the_warm_up_is_not_counted():
    diary = []
    contenders = [Scripted(name, diary) for name in "abc"]
    s = section(contenders)
    measure(s, contenders, num_repeats=3)
    assert Counter((x.contender, x.group, x.repeat) for x in s.samples) == Counter(
        (name, group, repeat) for name in "abc" for group in range(2) for repeat in range(3)
    )
    assert len(diary) == len(s.samples) + 3
    assert s.num_repeats == 3


def test_everyone_gets_the_same_seed_for_a_prompt():
    diary = []
    contenders = [Scripted(name, diary) for name in "ab"]
    measure(section(contenders), contenders, num_repeats=2)
    assert len({(prompt, seed) for _, prompt, seed in diary[2:]}) == 2


@pytest.mark.parametrize("num_groups", [1, 2, 3])
def test_no_pair_always_runs_in_the_same_order_on_a_prompt(num_groups):
    diary = []
    contenders = [Scripted(name, diary) for name in "abc"]
    measure(section(contenders, num_groups), contenders, num_repeats=4)
    for group in range(num_groups):
        orders = [[name for name, prompt, _ in diary[3:] if prompt == (group,)][i : i + 3] for i in range(0, 12, 3)]
        assert {o.index("a") < o.index("b") for o in orders} == {True, False}


def test_turn_order_is_a_permutation_and_each_comes_first_and_last():
    orders = [turn_order("abcd", group, repeat) for group in range(4) for repeat in range(2)]
    assert all(sorted(o) == list("abcd") for o in orders)
    assert {o[0] for o in orders} == {o[-1] for o in orders} == set("abcd")
    assert orders[0] == orders[1][::-1]


def test_one_repeat_is_done_however_late_it_is_and_no_second_one():
    contenders = [Scripted("a", [])]
    s = section(contenders)
    measure(s, contenders, num_repeats=5, deadline=0.0)
    assert s.num_repeats == 1 and len(s.samples) == 2


def test_unequal_work_is_refused():
    check_equal_work("a", Run([[1, 2], [3, 4]], 1.0), 2, 2)
    for token_ids in ([[1, 2], [3]], [[1, 2]], [[1, 2, 3], [3, 4]]):
        with pytest.raises(RuntimeError, match="a should have written 2 tokens"):
            check_equal_work("a", Run(token_ids, 1.0), 2, 2)


def test_texts_may_have_lengths_of_their_own():
    contenders = [Scripted("a", [])]
    s = section(contenders)
    s.lengths = [3, 2]
    measure(s, contenders, num_repeats=1)
    assert [x.run.num_tokens for x in s.samples] == [3, 2]
