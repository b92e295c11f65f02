"""GPU memory and utilisation at the moment of a scrape. Process CPU and memory come from prometheus-client itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from prometheus_client.core import GaugeMetricFamily


class GpuCollector:
    """Nothing on a machine without CUDA; utilisation only where nvidia-ml-py is installed."""

    def collect(self) -> Iterator[Any]:
        """Memory and work of each CUDA device, asked when Prometheus asks."""
        if not torch.cuda.is_available():
            return
        memory = GaugeMetricFamily("dspark_gpu_memory_used_bytes", "of all processes on the device", labels=["device"])
        total = GaugeMetricFamily("dspark_gpu_memory_bytes", "of the device", labels=["device"])
        busy = GaugeMetricFamily(
            "dspark_gpu_utilisation_ratio", "share of the last second it worked", labels=["device"]
        )
        for device in range(torch.cuda.device_count()):
            free, size = torch.cuda.mem_get_info(device)
            memory.add_metric([str(device)], size - free)
            total.add_metric([str(device)], size)
            try:
                busy.add_metric([str(device)], torch.cuda.utilization(device) / 100)
            except ModuleNotFoundError:
                continue
        yield from (memory, total, busy)
