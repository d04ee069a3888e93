"""Weighted datasets as one endless sequence, with exact proportions and no state.

The sequence of sources repeats every `PERIOD` samples. Weights become whole numbers of samples per period (largest remainder),
and the samples of a source are spread evenly over it (Webster's divisor sequence). So any `PERIOD` consecutive samples hold
exactly the stated numbers, and shorter runs are off by about one sample per source. Where a source stands at position p
follows from one table, so seeking costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hsmn_dist.data.stream.order import SampleOrder
from hsmn_dist.foundation.errors import DataError

PERIOD = 10_000


def period_counts(weights: Sequence[float], period: int = PERIOD) -> np.ndarray:
    """Samples of each source in a period ([num sources] int64): proportional to the weights, at least 1, summing to it.

    Raises:
        DataError: a weight is not positive, or there are more sources than samples in a period.
    """
    if not weights or min(weights) <= 0 or len(weights) > period:
        raise DataError(
            f"mixture weights {list(weights)}",
            allowed=f"1 to {period} weights above 0",
            action="change the weights of the stage's datasets",
        )
    exact = np.asarray(weights, dtype=np.float64) / float(np.sum(weights)) * period
    counts = np.maximum(1, np.floor(exact)).astype(np.int64)
    while counts.sum() < period:
        counts[np.argmax(exact - counts)] += 1
    while counts.sum() > period:  # sources of less than one sample were raised to one
        counts[np.argmax(np.where(counts > 1, counts - exact, -np.inf))] -= 1
    return counts


def period_pattern(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Source of each position of a period, and how many of that source came before it in the period."""
    sources = np.repeat(np.arange(len(counts)), counts)
    before = np.concatenate([np.arange(count) for count in counts])
    ideal = (before + 0.5) / counts[sources]
    spread = np.lexsort((sources, ideal))
    return sources[spread], before[spread]


class Mixture:
    """Position in the stream -> (source, sample number in the source's split)."""

    def __init__(self, orders: Sequence[SampleOrder], weights: Sequence[float]) -> None:
        self.orders = list(orders)
        self._counts = period_counts(weights)
        self._pattern, self._before = period_pattern(self._counts)
        sizes = np.array([order.num_samples for order in orders], dtype=np.int64)
        self._first_index = np.cumsum(sizes) - sizes

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and sample number at stream positions ([n] int64 -> two of [n] int64)."""
        if len(self.orders) == 1:
            return np.zeros(len(positions), dtype=np.int64), self.orders[0].sample_numbers(positions)
        periods, inside = positions // PERIOD, positions % PERIOD
        sources = self._pattern[inside]
        seen = periods * self._counts[sources] + self._before[inside]
        numbers = np.empty(len(positions), dtype=np.int64)
        for source in np.unique(sources).tolist():
            here = sources == source
            numbers[here] = self.orders[source].sample_numbers(seen[here])
        return sources, numbers

    def example_index(self, sources: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """One number for each sample of the mix, unique over all sources ([n] int64)."""
        return self._first_index[sources] + numbers
