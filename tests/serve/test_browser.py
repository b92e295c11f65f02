"""The two pages in a real browser, over a real server: before any data and with some, after clicks, on a phone."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dspark import Engine, load_drafter
from dspark.monitor.monitoring import Monitoring
from serve.browser import CHROMIUM, Page, browser
from serve.conftest import Served, serving
from serve.test_storms import BODY

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: chromium)")


@pytest.fixture
def page(tmp_path) -> Iterator[Page]:
    with browser(tmp_path) as one:
        yield one
        assert one.faults == []


@pytest.fixture
def monitored(target) -> Iterator[Served]:
    engine = Engine(target, load_drafter("dspark", target), "fixed:7")
    monitoring = Monitoring("tiny", "dspark", target.cache.limit)
    options = {"observers": [monitoring.step], "on_finished": [monitoring.request]}
    with serving(engine, options, monitoring) as served:
        yield served


def background(page: Page) -> str:
    return str(page.value("getComputedStyle(document.body).backgroundColor"))


def test_the_dashboard(monitored, page):
    page.open(monitored.url + "/dashboard")
    assert page.text("#tau") == page.text("#speedup") == "–"

    for seed in range(3):
        httpx.post(monitored.url + "/v1/chat/completions", json={**BODY, "seed": seed}, timeout=60).raise_for_status()
    monitored.settle()
    page.wait_for("document.querySelector('#requests')?.textContent === '3'")
    families = text_string_to_metric_families(httpx.get(monitored.url + "/metrics").text)
    metrics = {sample.name: sample.value for family in families for sample in family.samples}
    tau = metrics["dspark_committed_tokens_total"] / metrics["dspark_decode_passes_total"]
    assert float(page.text("#tau")) == pytest.approx(tau, rel=0.005)  # three digits
    assert page.wait_for("document.querySelectorAll('svg .bar').length") >= 1  # acceptance by position

    assert page.value("[50, 6.04, 0.0690, 1234].map(x => number(x, 2)).join()") == "50,6,0.069,1,234"
    light, before = background(page), page.picture()
    page.click("#theme")
    assert background(page) != light and page.picture() != before
    page.open(monitored.url + "/dashboard", width=360, height=740)
    page.wait_for("document.querySelector('#requests')?.textContent === '3'")
    assert page.value("document.documentElement.scrollWidth") <= 360
    assert not page.value("document.querySelector('#alerts').textContent") and page.text("#state").startswith(
        "no alerts"
    )
    monitored.stop()  # numbers that do not move any more must not look alive
    page.wait_for("document.querySelector('#alerts').textContent.startsWith('No numbers')")
    assert page.value("getComputedStyle(document.querySelector('main')).opacity") < "1"


def test_the_chat_page_marks_what_was_drafted(served, page, plain):
    expected = plain("What is a river?", temperature=0, max_tokens=40).text
    page.open(served.url)
    page.wait_for("document.querySelector('#model')?.textContent")
    page.value("document.querySelector('#temperature').value = 0, document.querySelector('#tokens').value = 40")
    page.click("#prompt")
    page.type("What is a river?")
    page.click("#send")
    page.wait_for("document.querySelector('.stats')")  # which come last
    assert page.text(".turn.user").endswith("What is a river?") and page.text(".turn.assistant").endswith(expected)
    assert 0 < len(page.text(".turn.assistant mark")) < len(expected)
    page.click("#clear")
    assert page.value("document.querySelectorAll('.turn').length") == 0
