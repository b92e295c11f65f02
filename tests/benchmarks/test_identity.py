import torch

from benchmarks.identity import Identity, compare, gap_by_model, tolerance
from benchmarks.measure import Run, Sample, Section
from benchmarks.prompts import EncodedPrompt
from dspark.noise import COUPLED, gumbel

PROMPT = EncodedPrompt("math", (9, 9))


def section(plain, other, temperature=0.0):
    runs = {"plain": Run(plain, 1.0, seeds=[3] * len(plain)), "other": Run(other, 1.0)}
    samples = [Sample(name, 0, repeat, "math", run) for name, run in runs.items() for repeat in range(2)]
    return Section(1, temperature, 3, dict.fromkeys(runs, "ours"), [[PROMPT] * len(plain)], samples=samples)


def test_identical_texts_need_no_explanation():
    assert compare(section([[1, 2, 3]], [[1, 2, 3]]), "other", "plain", "float32", None) == Identity(
        "other", 1, 1, 0, None
    )


def test_a_difference_is_looked_up_where_it_begins():
    asked = []

    def gap_of(context, first, other, temperature, seed):
        asked.append((list(context), first, other, temperature, seed))
        return 0.01, 10.0

    found = compare(section([[1, 2, 3], [4, 5, 6]], [[1, 7, 8], [4, 5, 6]], 1.0), "other", "plain", "bfloat16", gap_of)
    assert asked == [([9, 9, 1], 2, 7, 1.0, 3)]
    assert found == Identity("other", 1, 2, 1, 0.01) and found.num_unexplained == 0


def test_wide_gaps_and_any_difference_in_single_precision_stay_unexplained():
    s = section([[1, 2, 3]], [[1, 2, 4]])
    for dtype, gap in (("bfloat16", 5.0), ("float32", 0.001)):
        found = compare(s, "other", "plain", dtype, lambda *_, gap=gap: (gap, 10.0))
        assert (found.num_explained, found.num_unexplained) == (0, 1)
    assert tolerance("bfloat16", 10.0, 0.0) == tolerance("bfloat16", 10.0, 1.0) > 0


def test_the_gap_above_temperature_0_is_that_of_the_noisy_scores():
    logits = torch.tensor([1.0, 3.0, -2.0, 0.5])

    class Constant(torch.nn.Module):
        def forward(self, ids):
            return type("Output", (), {"logits": logits.expand(1, ids.shape[1], -1)})

    gap_of = gap_by_model(Constant())
    assert gap_of([7, 7], 1, 0, 0.0, 5) == (2.0, 3.0)
    noise = gumbel(5, 2, 1, 4, COUPLED, torch.device("cpu"))[0]
    expected = abs(float((logits / 0.7 + noise)[1] - (logits / 0.7 + noise)[0]))
    assert abs(gap_of([7, 7], 1, 0, 0.7, 5)[0] - expected) < 1e-6
