"""Our own series are on the page as prometheus-client's would be."""

from __future__ import annotations

import math

import prometheus_client as prom

from dspark.monitor.series import Registry


def test_a_page_looks_as_prometheus_client_would_write_it():
    prom.disable_created_metrics()
    bounds = (0.5, 1, 2.5)
    ours, theirs = Registry(), prom.CollectorRegistry()
    counters = (ours.counter("a", "some"), prom.Counter("a", "some", registry=theirs))
    labelled = (
        ours.counters("vllm:b", "by two", "x", "y"),
        prom.Counter("vllm:b", "by two", ["x", "y"], registry=theirs),
    )
    gauges = (ours.gauge("c", "now"), prom.Gauge("c", "now", registry=theirs))
    asked = (ours.gauges("d", "asked", "x"), prom.Gauge("d", "asked", ["x"], registry=theirs))
    histograms = (ours.histogram("e", "sizes", bounds), prom.Histogram("e", "sizes", buckets=bounds, registry=theirs))
    for a, b, c, d, e in zip(counters, labelled, gauges, asked, histograms, strict=True):
        a.inc()
        a.inc(2.5)
        b.labels("1", 'a "quoted" name').inc(3)
        b.labels("1", 'a "quoted" name').inc()
        b.labels("2", "+Inf")
        c.set(math.nan)
        d.labels("one").set_function(lambda: 7.0)
        for value in (0, 0.5, 0.6, 1, 2.5, 100):
            e.observe(value)
    assert prom.generate_latest(ours) == prom.generate_latest(theirs)
