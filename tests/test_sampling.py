"""Logits to laws, against transformers' own processors and against the definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as reference

from dspark.errors import InvalidRequest
from dspark.noise import COUPLED
from dspark.sampling import KeyedDraws, law, shape_logits, token_logprobs
from dspark.types import Request, SamplingParams
from tests.enumeration import shaped_law

PROMPT, OUTPUT = [3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5]
NO_CUT = SamplingParams()


def request(params: SamplingParams, output: list[int] = OUTPUT) -> Request:
    return Request(0, [*PROMPT, *output], params, num_prompt_tokens=len(PROMPT))


def random_logits(seed: int, rows: int = 4, vocab_size: int = 300, excluded: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab_size, generator=generator) * 3
    for row in logits:
        row[torch.randperm(vocab_size, generator=generator)[:excluded]] = -math.inf
    return logits


def shaped(logits: Tensor, params: SamplingParams) -> Tensor:
    """[N, V] probabilities by the code under test."""
    owner = request(params)
    return law(*shape_logits(logits, [owner] * len(logits), [[]] * len(logits)))


def transformers_law(logits: Tensor, params: SamplingParams) -> Tensor:
    scores, ids = logits.clone(), torch.tensor([PROMPT + OUTPUT] * len(logits))
    if params.repetition_penalty != 1:
        scores = reference.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    scores = reference.TemperatureLogitsWarper(params.temperature)(ids, scores)
    if params.top_k:
        scores = reference.TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = reference.TopPLogitsWarper(params.top_p)(ids, scores)
    if params.min_p:
        scores = reference.MinPLogitsWarper(params.min_p)(ids, scores)
    return scores.softmax(-1)


SETTINGS = [
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.5),
    SamplingParams(top_k=1),
    SamplingParams(top_k=7),
    SamplingParams(top_k=1000),
    SamplingParams(top_p=0.9),
    SamplingParams(top_p=0.3, temperature=1.3),
    SamplingParams(top_p=1e-6),
    SamplingParams(min_p=0.05),
    SamplingParams(min_p=1.0),
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(repetition_penalty=0.7, temperature=0.9),
    SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.1),
]


@pytest.mark.parametrize("excluded", [0, 250])
@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_same_law_as_transformers(params: SamplingParams, excluded: int) -> None:
    logits = random_logits(1, excluded=excluded)
    torch.testing.assert_close(shaped(logits, params), transformers_law(logits, params), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("vocab_size", [2000, 6000])
@pytest.mark.parametrize("scale", [0.05, 1.0, 4.0])
@pytest.mark.parametrize("top_p", [0.5, 0.95, 0.999])
def test_top_p_of_flat_and_of_peaked_laws(top_p: float, scale: float, vocab_size: int) -> None:
    """Flat ones hold their mass in more tokens than are looked at first."""
    logits, params = random_logits(2, 3, vocab_size).double().mul(scale / 3).float(), SamplingParams(top_p=top_p)
    found, expected = shaped(logits, params), transformers_law(logits, params)
    edge = (found > 0) ^ (expected > 0)  # where the sums of the two round differently: one token at most
    assert int(edge.sum(-1).max()) <= 1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_ties_at_the_edge_stay() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0, -math.inf]])
    assert (shaped(logits, SamplingParams(top_k=2)) > 0).tolist() == [[True, True, True, True, False, False]]
    assert (transformers_law(logits, SamplingParams(top_k=2)) > 0).tolist() == [[True] * 4 + [False] * 2]
    assert (shaped(logits, SamplingParams(top_p=0.6)) > 0).tolist() == [[True, True, True, True, False, False]]
    flat = torch.zeros(1, 5)
    for params in (SamplingParams(top_k=2), SamplingParams(top_p=0.3), SamplingParams(min_p=1.0)):
        assert shaped(flat, params).tolist() == [[pytest.approx(0.2)] * 5]


@pytest.mark.parametrize("params", [SamplingParams(top_k=1), SamplingParams(top_p=1e-9), SamplingParams(min_p=1.0)])
@pytest.mark.parametrize("temperature", [0.0, 1e-7, 0.01, 1.0, 100.0])
def test_the_likeliest_token_always_stays(params: SamplingParams, temperature: float) -> None:
    values = {**vars(params), "temperature": temperature}
    logits = random_logits(3)
    scores, _ = shape_logits(logits, [request(SamplingParams(**values))] * 4, [[]] * 4)
    assert scores.argmax(-1).tolist() == logits.argmax(-1).tolist()
    assert (scores.isfinite().sum(-1) == 1).all()


def test_penalties_by_hand() -> None:
    logits = torch.tensor([[4.0, 2.0, -2.0, 1.0, 0.0]])
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={4: 3.0})
    owner = Request(0, [1, 0, 0], params, num_prompt_tokens=1)  # prompt: 1; output: 0, 0
    scores, _ = shape_logits(logits, [owner], [[2]])
    # 0: 4/2 - .5 - 2*.25; 1: 2/2, in the prompt only; 2: -2*2 - .5 - .25, drafted; 3 untouched; 4: the bias alone.
    assert scores.tolist() == [[1.0, 1.0, -4.75, 1.0, 3.0]]


@pytest.mark.parametrize(
    "params", [*SETTINGS, SamplingParams(presence_penalty=1.5, logit_bias={7: -2, 1: 4.0})], ids=str
)
def test_same_law_as_the_definition(params: SamplingParams) -> None:
    logits = random_logits(4, rows=2, vocab_size=40)
    found = law(*shape_logits(logits, [request(params)] * 2, [[], [7, 7, 2]]))
    for row, drafted in enumerate([[], [7, 7, 2]]):
        expected = shaped_law(logits[row].tolist(), params, PROMPT, [*OUTPUT, *drafted])
        torch.testing.assert_close(found[row].double(), torch.tensor(expected).double(), atol=1e-6, rtol=1e-4)


def test_logits_are_left_alone() -> None:
    logits = random_logits(5)
    before = logits.clone()
    everything = SamplingParams(top_k=5, top_p=0.5, min_p=0.1, repetition_penalty=2.0, logit_bias={1: 3.0})
    shape_logits(logits, [request(everything)] * 4, [[]] * 4)
    assert torch.equal(logits, before)


def test_each_row_has_its_own_parameters() -> None:
    """Requests with different parameters in one call, several rows each: the same numbers as each row alone."""
    penalised = SamplingParams(frequency_penalty=0.3, presence_penalty=0.1, repetition_penalty=1.2, logit_bias={8: 1.0})
    settings = [NO_CUT, *SETTINGS, penalised, SamplingParams(temperature=0), SamplingParams(logit_bias={0: -9.0})]
    owners = [request(params, OUTPUT[:n]) for n, params in enumerate(settings) for _ in range(2)]
    previous = [[7, 7, 1][: n % 4] for n in range(len(owners))]
    logits = random_logits(6, len(owners), 1000) * torch.linspace(0.1, 1, len(owners))[:, None]
    scores, temperature = shape_logits(logits, owners, previous)
    draws = KeyedDraws(1000)
    seeds, positions = list(range(len(owners))), [5 * n for n in range(len(owners))]
    tokens = draws.tokens(scores, temperature, seeds, positions, COUPLED)
    for n, owner in enumerate(owners):
        alone, own_temperature = shape_logits(logits[n : n + 1], [owner], previous[n : n + 1])
        assert torch.equal(alone[0], scores[n])
        assert float(own_temperature) == float(temperature[n])
        assert int(draws.tokens(alone, own_temperature, seeds[n : n + 1], positions[n : n + 1], COUPLED)) == tokens[n]


def test_one_draw_for_greedy_and_sampled_rows() -> None:
    logits = random_logits(7, 2)
    owners = [request(SamplingParams(temperature=0)), request(SamplingParams(temperature=1.0))]
    scores, temperature = shape_logits(logits, owners, [[], []])
    greedy = [int(KeyedDraws(300).tokens(scores, temperature, [s, s], [0, 1], COUPLED)[0]) for s in range(20)]
    sampled = [int(KeyedDraws(300).tokens(scores, temperature, [s, s], [0, 1], COUPLED)[1]) for s in range(20)]
    assert set(greedy) == {int(logits[0].argmax())}
    assert len(set(sampled)) > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_are_single_precision(dtype: torch.dtype) -> None:
    logits = random_logits(8).to(dtype)
    scores, temperature = shape_logits(logits, [request(SamplingParams(top_p=0.9))] * 4, [[]] * 4)
    assert scores.dtype == temperature.dtype == torch.float32


def test_excluded_tokens_are_never_drawn() -> None:
    scores = torch.full((1, 5000), -math.inf)
    scores[0, 17] = -1e4
    draws = KeyedDraws(5000)
    assert {int(draws.tokens(scores, torch.ones(1, 1), [seed], [0], COUPLED)) for seed in range(50)} == {17}


def test_temperature_zero_is_the_limit() -> None:
    logits = random_logits(9)
    cold, _ = shape_logits(logits, [request(SamplingParams(temperature=0))] * 4, [[]] * 4)
    assert law(cold, torch.zeros(4, 1)).argmax(-1).tolist() == logits.argmax(-1).tolist()
    assert law(cold, torch.zeros(4, 1)).sum(-1).tolist() == [1.0] * 4
    tied = torch.tensor([[1.0, 3.0, 3.0]])
    assert law(tied, torch.zeros(1, 1)).tolist() == [[0.0, 1.0, 0.0]]
    assert int(KeyedDraws(3).tokens(tied, torch.zeros(1, 1), [0], [0], COUPLED)) == 1


def test_token_logprobs() -> None:
    logits = random_logits(10, 3, 20)
    expected = torch.log_softmax(logits, -1)
    found = token_logprobs(logits, [4, 0, 19], 3)
    for row, (entry, token) in enumerate(zip(found, [4, 0, 19], strict=True)):
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(float(expected[row, token]))
        values, ids = expected[row].topk(3)
        assert [pair[0] for pair in entry.top] == ids.tolist()
        assert [pair[1] for pair in entry.top] == pytest.approx(values.tolist())
    assert token_logprobs(logits, [4, 0, 19], 0)[0].top == ()
    assert len(token_logprobs(logits, [4, 0, 19], 99)[0].top) == 20


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 1e38),  # noise of that size is infinite, and then an excluded token is drawn as well
        ("temperature", True),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
        ("repetition_penalty", 1e-300),  # 0 in single precision
        ("presence_penalty", math.inf),
        ("presence_penalty", 1e300),
        ("frequency_penalty", math.nan),
        ("logit_bias", {3: math.nan}),
        ("logit_bias", {3: 1e39}),
        ("logit_bias", {3: -math.inf}),
        ("max_tokens", 0),
        ("logprobs", -1),
        ("stop", ("",)),
    ],
)
def test_bad_parameters_are_refused(name: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=f"{name} must be .*; got"):
        SamplingParams(**{name: value})


def test_the_largest_parameters_together_leave_a_law() -> None:
    params = SamplingParams(
        temperature=1e-30,
        top_p=0.5,
        min_p=0.5,
        repetition_penalty=1e-6,
        presence_penalty=-1e6,
        frequency_penalty=1e6,
        logit_bias={1: 1e6, 2: -1e6},
    )
    request = Request(0, [1, 2, 3, 1], params, num_prompt_tokens=2)
    scores, temperature = shape_logits(30 * torch.randn(2, 50), [request] * 2, [[], [1, 1]])
    assert not scores.isnan().any() and (scores > -math.inf).any(1).all()
    found = law(scores, temperature)
    torch.testing.assert_close(found.sum(-1), torch.ones(2))


def test_scores_that_are_no_numbers_have_a_law_and_others_keep_theirs() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0], [math.nan, 1.0, 2.0], [-math.inf] * 3, [1.0, math.inf, math.inf]])
    found = law(scores, torch.ones(4, 1))
    torch.testing.assert_close(found[0], torch.softmax(scores[0], -1))
    assert found[1:].tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 0]]


def test_good_parameters() -> None:
    assert SamplingParams(stop="end").stop == ("end",)
    assert not SamplingParams().penalises
    assert SamplingParams(presence_penalty=-1).penalises
