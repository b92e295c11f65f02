"""What /metrics says is what the engine did."""

from __future__ import annotations

import math

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from dspark.engine.engine import Engine
from dspark.monitor.canaries import Outcome
from dspark.monitor.prometheus import Metrics
from dspark.monitor.request_metrics import Objectives
from dspark.types import Round, SamplingParams
from engine.models import OracleDrafter, random_target
from monitor.records import finished, step


def metrics(**options) -> Metrics:
    return Metrics("tiny", "dspark", num_slots=100, **{"process": False, **options})


def values(m: Metrics) -> dict[str, float]:
    """Series by name and label values, as a scraper reads the page."""
    families = text_string_to_metric_families(m.render().decode())
    return {
        ".".join([s.name, *(v for k, v in sorted(s.labels.items()) if k not in ("model_name", "drafter"))]): s.value
        for family in families
        for s in family.samples
    }


def as_vllm_bench_reads_it(page: str) -> dict[str, object]:
    """Line by line and by substring, the last field being the value: `_created` or a new name would be added up."""
    totals = {"drafts": 0, "draft_tokens": 0, "accepted": 0}
    by_position: dict[int, int] = {}
    for line in page.split("\n"):
        if not line.strip().startswith("vllm:spec_decode"):
            continue
        value = int(float(line.split()[-1]))
        if "num_drafts" in line:
            totals["drafts"] += value
        elif "num_draft_tokens" in line:
            totals["draft_tokens"] += value
        elif "num_accepted_tokens_per_pos" in line:
            position = int(line.partition('position="')[2].partition('"')[0])
            by_position[position] = by_position.get(position, 0) + value
        elif "num_accepted_tokens" in line:
            totals["accepted"] += value
    return {**totals, "by_position": {k: n for k, n in by_position.items() if n}}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return random_target(tmp_path_factory.mktemp("target"))


def test_vllm_bench_reads_what_the_engine_did(target):
    prompts, params = [[3, 1, 4], [1, 5, 9]], SamplingParams(temperature=0, max_tokens=40)
    texts = [p + g.token_ids for p, g in zip(prompts, Engine(target).generate(prompts, params), strict=True)]
    m = metrics()
    engine = Engine(target, OracleDrafter(texts, error=0.2), scheduler="fixed:4", observers=[m.step])
    rounds = [r for g in engine.generate(prompts, params) for r in g.rounds]
    assert as_vllm_bench_reads_it(m.render().decode()) == {
        "drafts": sum(r.verified > 0 for r in rounds),
        "draft_tokens": sum(r.verified for r in rounds),
        "accepted": sum(r.accepted for r in rounds),
        "by_position": {k: n for k in range(9) if (n := sum(r.accepted > k for r in rounds))},
    }
    v = values(m)
    assert v["dspark_drafted_tokens_total"] == sum(r.drafted for r in rounds)
    assert v["dspark_pruned_draft_tokens_total"] == sum(r.drafted - r.verified for r in rounds) > 0
    assert v["dspark_wasted_draft_tokens_total"] == sum(r.verified - r.accepted for r in rounds) > 0
    assert v["dspark_proposals_total"] == sum(r.drafted > 0 for r in rounds) < len(rounds)
    assert v["dspark_committed_tokens_total"] == sum(r.accepted + 1 for r in rounds)
    assert v["dspark_decode_passes_total"] == len(rounds) == v["dspark_verified_length_count"]
    assert v["dspark_first_token_hits_total"] == sum(r.accepted > 0 for r in rounds)
    assert v["dspark_full_draft_hits_total"] == sum(r.accepted == r.drafted > 0 for r in rounds)
    assert v["dspark_prompt_tokens_total"] == 6
    assert v["dspark_requests_running"] == v["dspark_requests_waiting"] == 0


def test_nothing_runs_at_rest_however_requests_ended():
    m = metrics()
    m.step(step(num_free_slots=1))
    names = ("dspark_requests_running", "dspark_requests_waiting", "dspark_kv_usage_ratio")
    assert all(values(m)[name] > 0 for name in names)
    m.at_rest()
    assert [values(m)[name] for name in names] == [0, 0, 0]


def test_reached_counts_the_first_rejected_token_too():
    m = metrics()
    m.step(step(drafted=(7, 7), verified=(5, 2), accepted=(3, 2)))
    v = values(m)
    assert [v[f"dspark_reached_tokens_per_pos_total.{k}"] for k in range(6)] == [2, 2, 1, 1, 0, 0]


def test_deep_drafts_count_with_the_last_position():
    m = metrics()
    m.step(step(drafted=(50,), verified=(50,), accepted=(40,)))
    found = as_vllm_bench_reads_it(m.render().decode())
    assert sum(found["by_position"].values()) == found["accepted"] == 40
    assert max(found["by_position"]) == 31


def test_finished_requests_fill_the_latency_histograms():
    m = metrics(objectives=Objectives(ttft_seconds=1.0, per_token_seconds=0.2))
    m.request(finished())
    m.request(finished(finish_reason="cancelled", token_ids=[], token_seconds=[], start_seconds=None))
    m.request(finished(finish_reason="something new", token_ids=[1], token_seconds=[103.0]))
    v = values(m)
    assert v["dspark_time_to_first_token_seconds_sum"] == 1.0 + 3.0
    assert v["dspark_inter_token_latency_seconds_sum"] == v["dspark_inter_token_latency_seconds_count"] * 0.5 == 0.5
    assert v["dspark_time_per_output_token_seconds_sum"] == 0.25
    assert v["dspark_e2e_request_latency_seconds_sum"] == 1.5 + 3.0
    assert v["dspark_request_queue_time_seconds_sum"] == 1.0
    assert [v[f"dspark_requests_finished_total.{r}"] for r in ("stop", "cancelled", "error", "other")] == [1, 1, 0, 1]
    assert (v["dspark_slo_requests_total.ttft"], v["dspark_slo_good_total.ttft"]) == (2, 1)
    assert (v["dspark_slo_requests_total.per_token"], v["dspark_slo_good_total.per_token"]) == (1, 0)


def test_calibration_error_is_the_gap_between_said_and_seen():
    m = metrics()
    assert math.isnan(values(m)["dspark_calibration_error"])
    for _ in range(6):  # says 0.95, right 3 times of 4: the token after a rejection is not judged
        m.step(step(drafted=(3,), verified=(3,), accepted=(3,), confidence=[[0.95, 0.95, 0.95]]))
        m.step(step(drafted=(3,), verified=(3,), accepted=(0,), confidence=[[0.95, 0.05, 0.05]]))
    v = values(m)
    assert v["dspark_calibration_error"] == pytest.approx(0.2, abs=1e-3)
    assert (v["dspark_confidence_tokens_total.1"], v["dspark_confidence_accepted_total.1"]) == (24, 18)
    assert v["dspark_confidence_tokens_total.0.1"] == 0


def test_speedup_is_against_plain_steps_of_the_same_size():
    m = metrics()
    m.step(step(drafted=(4, 4), verified=(4, 4), accepted=(2, 2), seconds=0.1))
    assert math.isnan(values(m)["dspark_speedup_vs_plain"])  # nothing plain was measured yet
    for _ in range(3):
        m.step(step(drafted=(0, 0), verified=(0, 0), accepted=(0, 0), seconds=0.08))
    m.step(step(drafted=(4, 4), verified=(4, 4), accepted=(2, 2), seconds=0.1))  # 6 tokens: 3 plain steps
    m.step(step(drafted=(4, 4), verified=(4, 4), accepted=(2, 2), seconds=9.0, num_prompt_tokens=50))
    v = values(m)
    assert v["dspark_speedup_vs_plain"] == pytest.approx(2.4)
    assert v["dspark_plain_equivalent_seconds_total"] == pytest.approx(0.24)
    assert v["dspark_speculative_seconds_total"] == pytest.approx(0.1)


def test_no_request_can_add_a_series():
    m = metrics()
    m.step(step())
    names = set(values(m))
    for i in range(50):
        record = step(
            drafted=(i,),
            verified=(i,),
            accepted=(i,),
            confidence=[[i / 50] * i],
            skip_reason=f"reason {i}",
            num_skipped=1,
        )
        record.seconds[f"phase {i}"] = 1.0
        m.step(record)
        m.request(finished(request_id=i, drafter=f"drafter {i}", finish_reason=f"reason {i}"))
    m.canary(Outcome("equal", finished(), []))
    assert set(values(m)) == names


def test_process_memory_and_time_are_there():
    assert values(metrics(process=True))["process_resident_memory_bytes"] > 0


def test_trees_count_by_depth():
    m = metrics()
    record = step(drafted=(3,), verified=(3,), accepted=(1,), confidence=[[0.5, 0.5, 0.5]])
    record.parents = torch.tensor([[-1, -1, 1]])  # two siblings, and a child of the second
    record.survival = torch.tensor([[0.5, 0.5, 0.25]])
    record.accepted_nodes = torch.tensor([[False, True, False]])
    m.step(record)
    v = values(m)
    assert [v[f"dspark_reached_tokens_per_pos_total.{k}"] for k in range(3)] == [2, 1, 0]
    assert as_vllm_bench_reads_it(m.render().decode())["by_position"] == {0: 1}
    assert v["dspark_confidence_tokens_total.0.6"] == 3  # the child's chance given its parent is 0.5, too


def test_cost_error_and_regret():
    m = metrics(cost=lambda tokens, requests, context: 0.1 * tokens)
    m.step(step(verified=(5,), accepted=(3,), seconds=0.1, predicted_seconds=0.06))  # 0.075 s without drafting
    v = values(m)
    assert v["dspark_cost_error_ratio"] == pytest.approx(0.2)
    assert [v["dspark_predicted_step_seconds_total"], v["dspark_measured_step_seconds_total"]] == pytest.approx(
        [0.06, 0.075]
    )
    assert v["dspark_regret_seconds_total"] == pytest.approx(0.2)  # two tokens read in vain
    assert v["dspark_regret_ratio"] == pytest.approx(2 / 6)


def test_skipped_drafts_by_reason():
    m = metrics()
    m.step(step(drafted=(0, 4), verified=(0, 4), accepted=(0, 1), skip_reason="cost", num_skipped=1, num_faults=2))
    m.step(step(drafted=(0, 4), verified=(0, 4), accepted=(0, 1), skip_reason="a new one", num_skipped=1))
    v = values(m)
    assert (v["dspark_skipped_drafts_total.cost"], v["dspark_skipped_drafts_total.other"]) == (1, 1)
    assert v["dspark_draft_faults_total"] == 2


def test_budget_and_cost_by_load():
    m = metrics()
    m.step(step(drafted=(7,) * 3, verified=(4, 2, 3), accepted=(1, 0, 3), seconds=0.4, predicted_seconds=0.2))
    v = values(m)
    assert [v[f"dspark_load_{n}_total.4"] for n in ("passes", "verified_tokens", "committed_tokens")] == [3, 9, 7]
    assert v["dspark_cost_steps_total.16"] == 1
    assert v["dspark_cost_measured_seconds_total.16"] == pytest.approx(0.3)
    assert v["dspark_cost_believed_seconds_total.16"] == pytest.approx(0.2)


def test_first_token_acceptance_by_class_of_request():
    m = metrics()
    rounds = [Round(7, 5, 2), Round(7, 5, 0), Round(0, 0, 0)]
    m.request(finished(rounds=rounds, params=SamplingParams(temperature=0)))
    v = values(m)
    found = [v[f"dspark_class_{n}_total.{c}"] for c in ("greedy", "sampled") for n in ("drafts", "first_token_hits")]
    assert found == [2, 1, 0, 0]


def test_the_share_of_prompts_found_in_the_prefix_cache():
    m = metrics()
    assert math.isnan(values(m)["dspark_prefix_hit_ratio"])
    m.step(step(num_prefix_asked=100, num_prefix_found=64))
    m.step(step(num_prefix_asked=100, num_prefix_found=0))
    m.step(step())
    v = values(m)
    assert (v["dspark_prefix_asked_tokens_total"], v["dspark_prefix_found_tokens_total"]) == (200, 64)
    assert v["dspark_prefix_hit_ratio"] == pytest.approx(0.32, abs=0.001)
