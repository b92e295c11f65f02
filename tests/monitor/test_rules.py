"""monitoring/: the rules do what they say, and every series that they and Grafana ask for is one that we export."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dspark.monitor.prometheus import Metrics
from monitoring.exercise import FAULTS, faster

FOLDER = Path(__file__).parents[2] / "monitoring"
RULES = FOLDER / "prometheus" / "rules.yml"
promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")


def exported() -> set[str]:
    page = Metrics("t", "d", 100).render().decode()
    families = re.findall(r"^# TYPE (\S+) (\S+)", page, re.MULTILINE)
    names = {name for name, _ in families}
    histograms = {name for name, kind in families if kind == "histogram"}
    # The dashboard shows a GPU's memory; there may be none here.
    gpu = {"dspark_gpu_memory_used_bytes"}
    front = {f"dspark_front_{name}" for name in names if name.startswith("process_")}  # of the process that speaks HTTP
    return names | {f"{h}_{end}" for h in histograms for end in ("bucket", "sum", "count")} | gpu | front


def asked(text: str) -> set[str]:
    return set(re.findall(r"\b(?:dspark_|vllm:|process_)[a-z_0-9:]+", text))


def test_every_series_in_the_rules_is_exported():
    expressions = "\n".join(line for line in RULES.read_text().splitlines() if not line.lstrip().startswith("#"))
    names = asked(expressions)
    assert len(names) > 8 and names <= exported()


def test_every_series_in_grafanas_dashboard_is_exported():
    dashboard = json.loads((FOLDER / "grafana" / "dashboards" / "dspark.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    names = asked("\n".join(expressions))
    assert len(names) > 30 and names <= exported()


def test_every_alert_has_a_unit_test_and_a_fault():
    alerts = set(re.findall(r"- alert: (\w+)", RULES.read_text()))
    tested = set(re.findall(r"alertname: (\w+)", (FOLDER / "prometheus" / "rules_test.yml").read_text()))
    assert alerts == tested == {name for fault in FAULTS for name in fault.expected}


def test_exercised_rules_differ_in_time_alone():
    text = faster("x[15m] > 0\nfor: 10m\ny[1d], 3600) > 0.95\nz[5m]) > 200\nw > 14.4 * 0.01\nq[1h]", 60)
    assert (
        text
        == "x[15000ms] > 0\nfor: 10000ms\ny[1440000ms], 60) > 0.95\nz[5000ms]) > 3.33333\nw > 14.4 * 0.01\nq[60000ms]"
    )


@promtool
def test_promtool_accepts_rules_and_their_tests():
    for command in (["check", "rules", "rules.yml"], ["test", "rules", "rules_test.yml"]):
        done = subprocess.run(["promtool", *command], cwd=RULES.parent, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@promtool
def test_prometheus_understands_grafanas_queries(tmp_path):
    dashboard = json.loads((FOLDER / "grafana" / "dashboards" / "dspark.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    rules = [
        {"record": f"query:{i}", "expr": query.replace("$__rate_interval", "5m").replace("$instance", ".*")}
        for i, query in enumerate(queries)
    ]
    (tmp_path / "queries.yml").write_text(json.dumps({"groups": [{"name": "g", "rules": rules}]}))  # JSON is YAML
    done = subprocess.run(["promtool", "check", "rules", tmp_path / "queries.yml"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


@promtool
def test_the_unit_tests_notice_a_rule_that_is_wrong(tmp_path):
    for name in ("rules.yml", "rules_test.yml"):
        (tmp_path / name).write_text((RULES.parent / name).read_text().replace("< 0.85 *", "< 0.3 *"))
    done = subprocess.run(
        ["promtool", "test", "rules", "rules_test.yml"], cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode != 0
