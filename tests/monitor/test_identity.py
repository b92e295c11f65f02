import math

import pytest
import torch

from dspark.monitor.identity import first_difference, gap_between, judge, logits_by_model, logits_by_target, tolerance
from dspark.noise import COUPLED, gumbel
from dspark.types import Request, SamplingParams
from engine.models import _plain, random_target

GREEDY = SamplingParams(temperature=0)


def test_where_texts_part():
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2, 3], [1, 5, 6]) == 1
    assert first_difference([1, 2, 3], [1, 2]) == first_difference([1, 2], [1, 2, 3]) == 2


def test_a_near_tie_is_explained_only_where_the_dtype_can_turn_it():
    asked = []

    def logits_of(context):
        asked.append(list(context))
        return torch.tensor([10.0, 10.01, 3.0])

    def found(token, dtype):
        return judge([7, 8], [2, 1, 2], [2, token, 0], GREEDY, 0, dtype, logits_of)

    assert found(0, "bfloat16").is_explained and asked == [[7, 8, 2]]
    assert not found(2, "bfloat16").is_explained
    assert not found(0, "float32").is_explained and len(asked) == 2  # in float32 it is not even asked
    assert not judge([7], [1], [0], GREEDY, 0, "bfloat16", None).is_explained
    assert judge([7], [1, 2], [1, 2], GREEDY, 0, "bfloat16", logits_of) is None


def test_ending_early_has_no_excuse():
    difference = judge([7], [1, 2, 3], [1, 2], GREEDY, 0, "bfloat16", lambda _: torch.zeros(4))
    assert (difference.token_id, difference.plain_token_id, difference.is_explained) == (None, 3, False)


def test_the_gap_is_that_of_the_scores_that_chose():
    logits = torch.tensor([1.0, 3.0, -2.0, 0.5])
    params = SamplingParams(temperature=0.7, frequency_penalty=0.5, logit_bias={0: 1.0})
    request = Request(-1, [3, 3, 1, 1], params, num_prompt_tokens=2, seed=5)
    noise = gumbel(5, 4, 1, 4, COUPLED, torch.device("cpu"))[0]
    expected = (torch.tensor([2.0, 2.0, -2.0, 0.5]) / 0.7 + noise)[[0, 1]]
    assert gap_between(logits, 0, 1, request) == pytest.approx(abs(float(expected[0] - expected[1])), abs=1e-5)


def test_a_token_that_was_cut_off_is_as_far_as_the_last_kept_one():
    logits = torch.tensor([5.0, 4.0, 3.99, -2.0])
    request = Request(-1, [1], SamplingParams(temperature=2.0, top_k=2), num_prompt_tokens=1, seed=0)
    assert gap_between(logits, 2, 0, request) == pytest.approx(0.005, abs=1e-6)
    assert gap_between(logits, 3, 0, request) == pytest.approx(3.0)


def test_tolerance_grows_with_the_dtypes_spacing():
    assert tolerance("float32", 100.0, 1.0) == 0.0
    assert tolerance("bfloat16", 10.0, 0.0) == tolerance("bfloat16", 10.0, 1.0) == 8 * tolerance("float16", 10.0, 1.0)
    assert math.isclose(tolerance("bfloat16", 10.0, 0.5), 2 * tolerance("bfloat16", 10.0, 1.0))


def test_logits_of_target_and_of_plain_model_agree(tmp_path):
    target = random_target(tmp_path)
    model, text = _plain[target], [3, 1, 4, 1, 5]
    torch.testing.assert_close(logits_by_target(target)(text), logits_by_model(model)(text), atol=1e-4, rtol=1e-4)
    assert target.num_free_slots == target.cache.limit
