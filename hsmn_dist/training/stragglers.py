"""Which rank is slow? Compares what each rank computed by itself, because ranks that wait for each other all look alike.

Unusual: the compared time is that of the forward passes alone, in which ZeRO 0 to 2 do not talk; under ZeRO 3 a slow rank also
slows the others' gathers, and the ratio understates.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hsmn_dist.distributed.collectives import all_gather_objects
from hsmn_dist.foundation.log import logger

log = logger(__name__)
SLOW_RATIO = 1.5
"""A rank slower than this times the median of the others is named."""


@dataclass(frozen=True)
class Straggler:
    """The slowest rank, and its time over the median of the others'."""

    rank: int
    ratio: float


def slowest(seconds: Sequence[float]) -> Straggler:
    """The slowest of the ranks' times (entry r is rank r's); ratio 1 for one rank."""
    rank = max(range(len(seconds)), key=lambda index: seconds[index])
    others = [value for index, value in enumerate(seconds) if index != rank]
    typical = statistics.median(others) if others else seconds[rank]
    return Straggler(rank, seconds[rank] / typical if typical > 0 else 1.0)


class ForwardTimer:
    """Seconds of forward passes since the last `take`; on a GPU by events, which nobody waits for."""

    def __init__(self, device: torch.device) -> None:
        self._uses_events = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._started: float | torch.cuda.Event = 0.0

    def __enter__(self) -> ForwardTimer:
        if self._uses_events:
            self._started = torch.cuda.Event(enable_timing=True)
            self._started.record()
        else:
            self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if isinstance(self._started, float):
            self._seconds += time.perf_counter() - self._started
        else:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._events.append((self._started, end))

    def take(self) -> float:
        """The sum; starts anew. Call it after the step's loss has reached the host, so that the events are over."""
        seconds = self._seconds + sum(start.elapsed_time(end) for start, end in self._events) / 1000.0
        self._seconds, self._events = 0.0, []
        return seconds


def report_straggler(own_seconds: float, step: int) -> Straggler:
    """Compare this rank's time with the others', and name a slow one in the log of rank 0. Collective."""
    everyone = all_gather_objects((own_seconds, platform.node()))
    found = slowest([seconds for seconds, _ in everyone])
    if found.ratio > SLOW_RATIO:
        log.warning(
            "step %d: rank %d on %s is a straggler: its forward passes took %.2f times the others'",
            step,
            found.rank,
            everyone[found.rank][1],
            found.ratio,
        )
    return found
