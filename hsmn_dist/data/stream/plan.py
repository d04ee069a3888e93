"""BatchPlan: global batch b -> its rows, before any rank is looked at and without reading a shard.

Steps, each a pure function: positions of the batch -> (source, sample) by `mixture` -> like lengths together by `bucketing`
-> several examples to a row by `packing`. All of it needs the index alone, so a resumed run computes the batch it wants.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hsmn_dist.config.data import DataConfig
from hsmn_dist.data.shards.reader import SplitReader
from hsmn_dist.data.shards.remote import OWN_CACHE
from hsmn_dist.data.stream.bucketing import bucketed_rows
from hsmn_dist.data.stream.mixture import Mixture
from hsmn_dist.data.stream.order import SampleOrder, hash_key
from hsmn_dist.data.stream.packing import pack_rows
from hsmn_dist.foundation.errors import DataError


@dataclass(frozen=True)
class StreamSource:
    """A prepared folder (or its URL) and its share of the mixture."""

    folder: Path | str
    weight: float = 1.0


@dataclass(frozen=True)
class StreamSettings:
    """What decides the stream; the fields from `loader_workers` on are explained in `config.data.DataConfig`.

    Attributes:
        global_batch_examples: examples in an optimizer step over all ranks.
        micro_batch_examples: rows in a forward pass on one rank.
        seed: of the order.
        replay: folders of earlier stages.
        replay_fraction: their share of the stream, all of them together; 0 without `replay`.
    """

    global_batch_examples: int
    micro_batch_examples: int
    seed: int
    replay: tuple[StreamSource, ...] = ()
    replay_fraction: float = 0.0
    loader_workers: int = 0
    prefetch_batches: int = 2
    packs_examples: bool = False
    row_tokens: int = 640
    length_buckets: int = 1
    corrupt_policy: str = "raise"
    quarantine_limit: int = 0
    shuffle_window_shards: int = 16
    cache_folder: str = OWN_CACHE.cache_folder
    cache_bytes: int = OWN_CACHE.cache_bytes
    fetch_attempts: int = OWN_CACHE.fetch_attempts

    @classmethod
    def from_config(
        cls,
        data: DataConfig,
        *,
        global_batch_examples: int,
        micro_batch_examples: int,
        seed: int,
        replay: Sequence[StreamSource] = (),
        replay_fraction: float = 0.0,
    ) -> StreamSettings:
        """Settings of a stage: its batches and replay, the rest from the run's `data` section."""
        return cls(
            global_batch_examples=global_batch_examples,
            micro_batch_examples=micro_batch_examples,
            seed=seed,
            replay=tuple(replay),
            replay_fraction=replay_fraction if replay else 0.0,
            loader_workers=data.loader_workers,
            prefetch_batches=data.prefetch_batches,
            packs_examples=data.packs_examples,
            row_tokens=data.max_context_tokens + data.max_target_tokens,
            length_buckets=data.length_buckets,
            corrupt_policy=data.corrupt_policy,
            quarantine_limit=data.quarantine_limit,
            shuffle_window_shards=data.shuffle_window_shards,
            cache_folder=data.cache_folder,
            cache_bytes=data.cache_bytes,
            fetch_attempts=data.fetch_attempts,
        )


@dataclass(frozen=True)
class PlannedRow:
    """One row of a global batch: (source, sample number, example index) of each of its examples."""

    samples: tuple[tuple[int, int, int], ...]


def mixture_weights(sources: Sequence[StreamSource], settings: StreamSettings) -> list[float]:
    """Shares of the sources, then of the replayed folders; they sum to 1."""
    fraction = settings.replay_fraction if settings.replay else 0.0
    if not 0 <= fraction < 1:
        raise DataError(
            f"replay_fraction {fraction}",
            allowed="0 up to, not including, 1",
            action="change continual.replay_fraction",
        )
    own = sum(source.weight for source in sources)
    old = sum(source.weight for source in settings.replay)
    shares = [source.weight / own * (1 - fraction) for source in sources]
    if fraction:
        shares.extend(source.weight / old * fraction for source in settings.replay)
    return shares


class BatchPlan:
    """The rows of every global batch of a stream.

    `readers` are those of the sources, then of the replayed folders when their share is above 0.
    """

    def __init__(self, readers: Sequence[SplitReader], weights: Sequence[float], settings: StreamSettings) -> None:
        self._readers = list(readers)
        self._settings = settings
        orders = [
            SampleOrder(
                reader.shard_sizes.tolist(), int(hash_key(settings.seed, source)[0]), settings.shuffle_window_shards
            )
            for source, reader in enumerate(readers)
        ]
        self._mixture = Mixture(orders, weights)
        self.order_id = _order_id(readers, weights, settings)

    def rows(self, first_position: int) -> list[PlannedRow]:
        """Rows of the global batch whose first sample stands at `first_position` of the stream."""
        batch = self._settings.global_batch_examples
        if self._settings.length_buckets > 1:
            sources, numbers = self._bucketed(first_position, batch)
        else:
            sources, numbers = self._mixture.locate(np.arange(first_position, first_position + batch))
        index = self._mixture.example_index(sources, numbers)
        samples = list(zip(sources.tolist(), numbers.tolist(), index.tolist(), strict=True))
        if not self._settings.packs_examples:
            return [PlannedRow((sample,)) for sample in samples]
        packed = pack_rows(self._lengths(sources, numbers), self._settings.row_tokens)
        return [PlannedRow(tuple(samples[example] for example in row)) for row in packed]

    def _bucketed(self, first_position: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
        buckets = self._settings.length_buckets
        window, inside = divmod(first_position, buckets * batch)
        first = window * buckets * batch
        sources, numbers = self._mixture.locate(np.arange(first, first + buckets * batch))
        lengths = self._lengths(sources, numbers)
        chosen = bucketed_rows(lengths, buckets, self._settings.seed, window)[inside // batch]
        return sources[chosen], numbers[chosen]

    def _lengths(self, sources: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        lengths = np.empty(len(sources), dtype=np.int64)
        for source in np.unique(sources).tolist():
            here = sources == source
            lengths[here] = self._readers[source].lengths(numbers[here]).sum(axis=1)
        return lengths


def _order_id(readers: Sequence[SplitReader], weights: Sequence[float], settings: StreamSettings) -> int:
    value = {
        "data": [[reader.split, [shard.sha256 for shard in reader.entry.shards]] for reader in readers],
        "weights": [f"{weight:.12g}" for weight in weights],
        "window": settings.shuffle_window_shards,
    }
    return int(hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12], 16)
