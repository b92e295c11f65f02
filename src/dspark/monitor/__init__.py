"""Watching an engine that serves, through its StepRecords and RequestRecords: metrics, events, drift, canaries."""
