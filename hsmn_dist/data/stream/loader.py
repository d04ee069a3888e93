"""build_loader: prepared folders -> this rank's micro-batches, step after step, from any position.

What is unusual: the stream is endless and its position is a number of samples. Global batch b is the same rows in the same
order for every number of ranks and background threads; a resumed loader computes the batch it wants and reads that one first.
Threads read, check, decode and collate ahead of the step; batches are handed out in order whoever finishes first.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from hsmn_dist.data.shards.reader import DamagedSample, SplitReader, Tokens, open_folder
from hsmn_dist.data.shards.remote import OWN_CACHE
from hsmn_dist.data.stream.collate import Row, collate, collate_packed, padding_counts
from hsmn_dist.data.stream.cursor import Cursor
from hsmn_dist.data.stream.order import permutation
from hsmn_dist.data.stream.partition import micro_batch_rows, num_micro_batches, rank_rows
from hsmn_dist.data.stream.plan import BatchPlan, PlannedRow, StreamSettings, StreamSource, mixture_weights
from hsmn_dist.foundation.errors import DataError
from hsmn_dist.foundation.log import logger

Batch = dict[str, Tensor]
_LOG = logger(__name__)


@dataclass
class StreamStats:
    """What this rank's stream has done since it was built.

    Attributes:
        wait_seconds: time the training thread waited for a batch (with no background thread: the time it made them).
        num_batches: global batches handed out.
        num_samples: samples of this rank.
        num_replayed: those of them that came from earlier stages.
        num_quarantined: damaged samples passed over.
        num_padding: padded positions, contexts and targets.
        num_positions: all positions.
    """

    wait_seconds: float = 0.0
    num_batches: int = 0
    num_samples: int = 0
    num_replayed: int = 0
    num_quarantined: int = 0
    num_padding: int = 0
    num_positions: int = 0

    @property
    def padding_ratio(self) -> float:
        """Share of the positions that are padding."""
        return self.num_padding / max(1, self.num_positions)

    @property
    def replay_ratio(self) -> float:
        """Share of the samples that came from earlier stages."""
        return self.num_replayed / max(1, self.num_samples)


@dataclass
class _Made:
    batches: list[Batch]
    stats: StreamStats
    first_damage: DamagedSample | None


class StreamLoader:
    """Iterates over optimizer steps; each element is this rank's list of micro-batches.

    Closing (or leaving a `with` block) ends the background threads and closes the shards.
    """

    def __init__(
        self,
        readers: Sequence[SplitReader],
        plan: BatchPlan,
        settings: StreamSettings,
        rank: int,
        world_size: int,
        cursor: Cursor,
        num_own_sources: int,
    ) -> None:
        self._readers = list(readers)
        self._plan = plan
        self._settings = settings
        self._rank, self._world_size = rank, world_size
        self._cursor = cursor
        self._num_own_sources = num_own_sources
        self.stats = StreamStats()
        workers = settings.loader_workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="stream") if workers else None
        self._pending: deque[Future[_Made]] = deque()
        self._next_position = cursor.samples_seen

    @property
    def wait_seconds(self) -> float:
        """Seconds the training thread has waited for batches since the loader was built."""
        return self.stats.wait_seconds

    def metrics(self) -> dict[str, float]:
        """This rank's numbers for the tracker since the loader was built; names as in `tracking.metric_names`."""
        return {
            "data/padding_ratio": self.stats.padding_ratio,
            "data/replay_ratio": self.stats.replay_ratio,
            "data/quarantined_count": float(self._cursor.num_quarantined),
            "data/wait_seconds": self.stats.wait_seconds,
        }

    def cursor(self) -> Cursor:
        """The position after the batches that were handed out."""
        return self._cursor

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        start = time.perf_counter()
        made = self._take()
        self.stats.wait_seconds += time.perf_counter() - start
        num_quarantined = self._cursor.num_quarantined + made.stats.num_quarantined
        if made.first_damage is not None:
            self._account_for_damage(made.first_damage, num_quarantined)
        self._cursor = replace(
            self._cursor,
            samples_seen=self._cursor.samples_seen + self._settings.global_batch_examples,
            batches_seen=self._cursor.batches_seen + 1,
            num_quarantined=num_quarantined,
        )
        for name in ("num_samples", "num_replayed", "num_quarantined", "num_padding", "num_positions"):
            setattr(self.stats, name, getattr(self.stats, name) + getattr(made.stats, name))
        self.stats.num_batches += 1
        return made.batches

    def close(self) -> None:
        """End the background threads and close the shards."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        self._pending.clear()
        for reader in self._readers:
            reader.close()

    def __enter__(self) -> StreamLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self) -> _Made:
        if self._pool is None:
            self._next_position += self._settings.global_batch_examples
            return self._make(self._next_position - self._settings.global_batch_examples)
        while len(self._pending) < max(self._settings.prefetch_batches, self._settings.loader_workers):
            self._pending.append(self._pool.submit(self._make, self._next_position))
            self._next_position += self._settings.global_batch_examples
        return self._pending.popleft().result()

    def _make(self, position: int) -> _Made:
        rows = self._plan.rows(position)
        settings = self._settings
        count = num_micro_batches(len(rows), settings.micro_batch_examples, self._world_size)
        mine = rank_rows(len(rows), self._rank, self._world_size)
        made = _Made([], StreamStats(), None)
        read = self._read_all([rows[number] for number in mine], made)
        for numbers in micro_batch_rows(range(len(read)), settings.micro_batch_examples, count):
            micro = [read[number] for number in numbers]
            micro.extend(Row([]) for _ in range(settings.micro_batch_examples - len(micro)))
            batch = collate_packed(micro) if settings.packs_examples else collate(micro)
            num_padding, num_positions = padding_counts(batch)
            made.stats.num_padding += num_padding
            made.stats.num_positions += num_positions
            made.batches.append(batch)
        return made

    def _read_all(self, planned: list[PlannedRow], made: _Made) -> list[Row]:
        samples = [sample for row in planned for sample in row.samples]
        made.stats.num_samples += len(samples)
        made.stats.num_replayed += sum(source >= self._num_own_sources for source, _, _ in samples)
        tokens: dict[tuple[int, int], Tokens | None] = {}
        for source in sorted({source for source, _, _ in samples}):
            numbers = [number for own, number, _ in samples if own == source]
            tokens.update(zip([(source, n) for n in numbers], self._read_source(source, numbers, made), strict=True))
        rows = []
        for row in planned:
            found = (tokens[source, number] for source, number, _ in row.samples)
            rows.append(Row([pair for pair in found if pair is not None], row.samples[0][2]))
        return rows

    def _read_source(self, source: int, numbers: list[int], made: _Made) -> Sequence[Tokens | None]:
        reader = self._readers[source]
        try:
            return reader.read_many_tokens(numbers)
        except DamagedSample:
            if self._settings.corrupt_policy != "quarantine":
                raise
        found: list[Tokens | None] = []
        for number in numbers:  # once more, one by one, to pass over the damaged ones alone
            try:
                found.append(reader.read_tokens(number))
            except DamagedSample as error:
                found.append(None)
                made.stats.num_quarantined += 1
                made.first_damage = made.first_damage or error
        return found

    def _account_for_damage(self, error: DamagedSample, num_quarantined: int) -> None:
        limit = self._settings.quarantine_limit
        _LOG.warning("passed over a damaged sample (%d of at most %d): %s", num_quarantined, limit, error.found)
        if num_quarantined > limit:
            raise DamagedSample(
                f"{error.found}; {num_quarantined} damaged samples in all",
                allowed=f"at most {limit} (data.quarantine_limit)",
                action="copy or prepare the damaged shards again, or raise the limit",
            ) from error


def open_split(folder: Path | str, split: str, settings: StreamSettings | None = None) -> SplitReader:
    """A reader of a non-empty split.

    Raises:
        DataError: there is no such folder or split, or the split holds no sample.
    """
    reader = open_folder(folder, split, settings or OWN_CACHE)
    if len(reader) == 0:
        raise DataError(
            f"{folder}: the split {split!r} is empty",
            allowed="at least one sample",
            action="prepare more examples, or with another data.split_seed or data.split",
        )
    return reader


def build_loader(
    sources: Sequence[StreamSource],
    split: str,
    settings: StreamSettings,
    rank: int = 0,
    world_size: int = 1,
    cursor: Cursor | None = None,
) -> StreamLoader:
    """The stream of one rank, from the start or from a cursor.

    Raises:
        DataError: nothing to read, damaged indexes, or a cursor of other data or another seed.
    """
    if not sources:
        raise DataError("a stream without a source", allowed="at least one folder", action="name the stage's datasets")
    weights = mixture_weights(sources, settings)
    folders = [*sources, *settings.replay][: len(weights)]
    readers = [open_split(source.folder, split, settings) for source in folders]
    _check_tokenizers(readers)
    plan = BatchPlan(readers, weights, settings)
    start = cursor or Cursor(seed=settings.seed, order_id=plan.order_id)
    _check_cursor(start, settings, plan)
    return StreamLoader(readers, plan, settings, rank, world_size, start, len(sources))


def _check_tokenizers(readers: Sequence[SplitReader]) -> None:
    first = readers[0]
    for reader in readers[1:]:
        if reader.index.tokenizer_digest != first.index.tokenizer_digest:
            raise DataError(
                f"{reader.name}: tokens of another tokenizer than {first.name}",
                allowed="folders prepared with one tokenizer",
                action="prepare the datasets of a run together",
            )


def _check_cursor(cursor: Cursor, settings: StreamSettings, plan: BatchPlan) -> None:
    problem = ""
    if cursor.seed != settings.seed:
        problem = f"was counted with seed {cursor.seed}, the stream has {settings.seed}"
    elif cursor.order_id != plan.order_id:
        problem = "was counted in other data, weights or shuffle windows"
    elif settings.length_buckets > 1 and cursor.samples_seen % settings.global_batch_examples:
        problem = f"({cursor.samples_seen} samples) is not a whole number of batches, which length buckets need"
    if problem:
        raise DataError(
            f"the cursor of the checkpoint {problem}",
            allowed="the data, mixture and seed with which the checkpoint was written",
            action="resume with the run's own configuration, or start the stage anew",
        )


def iter_split(
    folder: Path | str,
    split: str,
    micro_batch_examples: int,
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
    *,
    shuffle_seed: int | None = None,
    settings: StreamSettings | None = None,
) -> Iterator[Batch]:
    """The first `limit` examples of a split (None or 0: all), dealt to the ranks in blocks of one micro-batch.

    Every rank gets the same number of batches of the same number of rows; rows beyond the last example have an all-False
    loss mask and example_index -1. With `shuffle_seed` the examples are the first of that shuffle instead, which matters
    where a dataset is sorted by subject. `settings` name the cache of folders at URLs. Damaged samples raise.
    """
    reader = open_split(folder, split, settings)
    try:
        total = min(len(reader), limit) if limit else len(reader)
        order = permutation(len(reader), shuffle_seed) if shuffle_seed is not None else np.arange(total)
        for start in range(0, total, micro_batch_examples * world_size):
            first = start + rank * micro_batch_examples
            numbers = order[first : min(first + micro_batch_examples, total)].tolist()
            tokens = reader.read_many_tokens(numbers)
            rows = [Row([pair], number) for pair, number in zip(tokens, numbers, strict=True)]
            rows.extend(Row([]) for _ in range(micro_batch_examples - len(rows)))
            yield collate(rows)
    finally:
        reader.close()
