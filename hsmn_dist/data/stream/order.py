"""The order of one dataset: a pure function from (seed, epoch, shard sizes) to sample numbers. No files, no clock, no ranks.

Each epoch shuffles the shards, takes them in windows of a few shards, and shuffles all samples of a window together. A window
bounds how many shards are in use at a time, which is what a bounded local cache of remote shards needs; with as many shards in
a window as there are, the whole dataset is one uniform shuffle.

What is unusual: a permutation is the sorted order of hashed numbers (splitmix64), not a library's random generator, so the
order stays the same on every machine and for every version of numpy. Source of the hash: Steele, Lea and Flood, "Fast
splittable pseudorandom number generators", OOPSLA 2014 (the mixing function of SplitMix64).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

_CACHED_WINDOWS = 4


def mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer on uint64 values, element by element."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def hash_key(*parts: int) -> np.ndarray:
    """One uint64 (shape [1]) that depends on every one of the integers and their order."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        key = mix(key ^ np.array([part % (1 << 64)], dtype=np.uint64))
    return key


def permutation(size: int, *key: int) -> np.ndarray:
    """A uniform permutation of 0..size-1 ([size] int64), decided by the key."""
    hashed = mix(np.arange(size, dtype=np.uint64) ^ hash_key(*key))
    return np.argsort(hashed, kind="stable")


class SampleOrder:
    """Position in an endless stream of epochs -> sample number in the split.

    Args:
        shard_sizes: samples in each shard, in the order of the index.
        seed: of the whole order.
        window_shards: shards that are shuffled together; 0 means all of them.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, window_shards: int = 0) -> None:
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(self.sizes.sum())
        self._seed = seed
        self._window_shards = window_shards or max(1, len(self.sizes))
        self._starts = np.cumsum(self.sizes) - self.sizes
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()  # background threads ask for different batches at the same time
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def sample_numbers(self, positions: np.ndarray) -> np.ndarray:
        """Sample numbers at stream positions ([n] int64 -> [n] int64). Position p lies in epoch p // num_samples."""
        with self._lock:
            return self._sample_numbers(positions)

    def _sample_numbers(self, positions: np.ndarray) -> np.ndarray:
        numbers = np.empty(len(positions), dtype=np.int64)
        epochs = positions // self.num_samples
        for epoch in np.unique(epochs).tolist():
            here = np.flatnonzero(epochs == epoch)
            local = positions[here] - epoch * self.num_samples
            _, ends = self._epoch(epoch)
            windows = np.searchsorted(ends, local, side="right")
            for window in np.unique(windows).tolist():
                inside = windows == window
                start = int(ends[window - 1]) if window else 0
                numbers[here[inside]] = self._window(epoch, window)[local[inside] - start]
        return numbers

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        # Shard order of the epoch, and where each window of it ends.
        if epoch not in self._epochs:
            shards = permutation(len(self.sizes), self._seed, epoch, 0)
            totals = np.cumsum(self.sizes[shards])
            last = np.minimum(
                np.arange(self._window_shards, len(shards) + self._window_shards, self._window_shards), len(shards)
            )
            self._epochs[epoch] = (shards, totals[last - 1])
            while len(self._epochs) > _CACHED_WINDOWS:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _window(self, epoch: int, window: int) -> np.ndarray:
        # Sample numbers of a window in their shuffled order.
        key = (epoch, window)
        if key not in self._windows:
            first = window * self._window_shards
            shards = self._epoch(epoch)[0][first : first + self._window_shards]
            numbers = np.concatenate([np.arange(self._starts[s], self._starts[s] + self.sizes[s]) for s in shards])
            self._windows[key] = numbers[permutation(len(numbers), self._seed, epoch, 1, window)]
            while len(self._windows) > _CACHED_WINDOWS:
                self._windows.popitem(last=False)
        return self._windows[key]
