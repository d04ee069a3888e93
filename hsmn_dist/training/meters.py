"""What a step costs: seconds by part, tokens per second, memory. No device is waited for here.

On a GPU the parts are the times of launching work, except that the step as a whole ends with the gradient norm's transfer to the
host; step seconds and tokens per second are therefore true, and the parts add up to them.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator

import torch

from hsmn_dist.tracking import metric_names as names

_PARTS = {
    "data": names.PERF_DATA_WAIT_SECONDS,
    "forward_backward": names.PERF_FORWARD_BACKWARD_SECONDS,
    "penalty": names.PERF_PENALTY_SECONDS,
    "optimizer": names.PERF_OPTIMIZER_SECONDS,
    "checkpoint": names.PERF_CHECKPOINT_SECONDS,
}


class StepMeter:
    """Sums over the steps between two logged points."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = dict.fromkeys(_PARTS, 0.0)
        self._num_steps = 0
        self._num_tokens = 0
        self._started = time.perf_counter()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside as `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def end_step(self, num_tokens: int) -> None:
        """A step of `num_tokens` tokens (contexts and targets, all ranks, no padding) is done."""
        self._num_steps += 1
        self._num_tokens += num_tokens

    @property
    def tokens_per_second(self) -> float:
        """Since the last logged point."""
        return self._num_tokens / max(time.perf_counter() - self._started, 1e-9)

    def take(self) -> dict[str, float]:
        """Means per step since the last call, by metric name; starts anew."""
        steps = max(self._num_steps, 1)
        elapsed = time.perf_counter() - self._started
        values = {metric: self._seconds[part] / steps for part, metric in _PARTS.items()}
        values[names.PERF_STEP_SECONDS] = elapsed / steps
        values[names.PERF_TOKENS_PER_SECOND] = self.tokens_per_second
        values.update(memory_metrics(self._device))
        self.__init__(self._device)  # type: ignore[misc]
        return values


def memory_metrics(device: torch.device) -> dict[str, float]:
    """Memory now and at its peak: of the device, or resident memory of this process where there is none."""
    if device.type == "cuda":
        return {
            names.PERF_MEMORY_BYTES: float(torch.cuda.memory_allocated(device)),
            names.PERF_PEAK_MEMORY_BYTES: float(torch.cuda.max_memory_allocated(device)),
        }
    # Linux reports kibibytes, macOS bytes.
    peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)
    return {names.PERF_MEMORY_BYTES: _resident_bytes(peak), names.PERF_PEAK_MEMORY_BYTES: peak}


def _resident_bytes(otherwise: float) -> float:
    try:
        with open("/proc/self/statm", encoding="ascii") as stream:
            return float(stream.read().split()[1]) * resource.getpagesize()
    except OSError:
        return otherwise
