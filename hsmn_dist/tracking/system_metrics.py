"""State of the machine: processor, memory, disk, network, GPUs where `pynvml` is installed.

Names follow MLflow's own (`system/...`), so that its "System metrics" tab shows them.
"""

from __future__ import annotations

import time
from typing import Any

from hsmn_dist.foundation.errors import MissingExtraError
from hsmn_dist.foundation.extras import require

_MEGABYTE = 1e6


class SystemSampler:
    """Takes a sample every `every_seconds`; 0 never does.

    The step of a sample is the number of seconds since 1970, so that a resumed run goes on where it stopped.
    """

    def __init__(self, every_seconds: float) -> None:
        self._every_seconds = every_seconds
        self._next = time.monotonic()
        self._psutil: Any = None
        self._gpus: list[Any] | None = None
        self._nvml: Any = None
        self.step = 0

    def sample_if_due(self) -> dict[str, float]:
        """Metric name -> value, or nothing when it is too early."""
        now = time.monotonic()
        if self._every_seconds <= 0 or now < self._next:
            return {}
        self._next = now + self._every_seconds
        self.step = int(time.time())
        return {**self._host(), **self._devices()}

    def _host(self) -> dict[str, float]:
        psutil = self._psutil = self._psutil or require("psutil")
        memory, disk, network = psutil.virtual_memory(), psutil.disk_usage("/"), psutil.net_io_counters()
        values = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": memory.used / _MEGABYTE,
            "system/system_memory_usage_percentage": memory.percent,
            "system/process_memory_megabytes": psutil.Process().memory_info().rss / _MEGABYTE,
            "system/disk_usage_percentage": disk.percent,
            "system/disk_available_megabytes": disk.free / _MEGABYTE,
        }
        if network is not None:
            values["system/network_receive_megabytes"] = network.bytes_recv / _MEGABYTE
            values["system/network_transmit_megabytes"] = network.bytes_sent / _MEGABYTE
        return {name: float(value) for name, value in values.items()}

    def _devices(self) -> dict[str, float]:
        if self._gpus is None:
            self._gpus = self._open_devices()
        values: dict[str, float] = {}
        for index, handle in enumerate(self._gpus):
            memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
            values[f"system/gpu_{index}_memory_usage_megabytes"] = memory.used / _MEGABYTE
            values[f"system/gpu_{index}_memory_usage_percentage"] = 100.0 * memory.used / memory.total
            utilisation = self._nvml.nvmlDeviceGetUtilizationRates(handle)
            values[f"system/gpu_{index}_utilization_percentage"] = float(utilisation.gpu)
            values[f"system/gpu_{index}_power_usage_watts"] = self._nvml.nvmlDeviceGetPowerUsage(handle) / 1000
        return values

    def _open_devices(self) -> list[Any]:
        try:
            self._nvml = require("pynvml")
        except MissingExtraError:
            return []
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError:
            return []
        return [self._nvml.nvmlDeviceGetHandleByIndex(i) for i in range(self._nvml.nvmlDeviceGetCount())]
