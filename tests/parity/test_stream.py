"""The stream's promise: the sequence of global batches is that of one process, whatever reads it and however often it stops.

The reference is the plan written out slowly: one process, one sample at a time, from the definition of order and mixture.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hsmn_dist.data.shards.reader import SplitReader
from hsmn_dist.data.stream.cursor import Cursor
from hsmn_dist.data.stream.loader import build_loader
from hsmn_dist.data.stream.mixture import PERIOD
from hsmn_dist.data.stream.order import SampleOrder, hash_key
from hsmn_dist.data.stream.plan import StreamSettings, StreamSource
from tests.support.shards import write_folder

SIZES = {"a": 37, "b": 60, "c": 11}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stream")
    return {name: write_folder(root / name, size, name=name) for name, size in SIZES.items()}


@dataclass(frozen=True)
class Segment:
    """A stretch of the run: so many steps on so many ranks with so many threads."""

    num_steps: int
    world_size: int
    workers: int


SEGMENTS = st.lists(
    st.builds(Segment, st.integers(1, 5), st.integers(1, 16), st.integers(0, 4)), min_size=1, max_size=4
)
MIXTURES = st.dictionaries(st.sampled_from(sorted(SIZES)), st.sampled_from([0.2, 0.5, 1.0, 3.0]), min_size=1)


def global_batch(steps_of_ranks: list[list[dict[str, torch.Tensor]]]) -> list[tuple[int, tuple[int, ...]]]:
    """(example index, scored target ids) of every real row, ranks in order."""
    rows = []
    for micro_batches in steps_of_ranks:
        for batch in micro_batches:
            for index, ids, mask in zip(batch["example_index"], batch["target_ids"], batch["loss_mask"], strict=True):
                if index >= 0:
                    rows.append((int(index), tuple(ids[mask].tolist())))
    return rows


def run(
    sources: list[StreamSource], stream: StreamSettings, segments: list[Segment]
) -> tuple[list[list[tuple[int, tuple[int, ...]]]], Cursor]:
    """Global batches over all segments; each segment starts anew from the cursor of the one before."""
    batches, cursor = [], None
    for segment in segments:
        with_workers = replace(stream, loader_workers=segment.workers)
        loaders = [
            build_loader(sources, "train", with_workers, rank, segment.world_size, cursor)
            for rank in range(segment.world_size)
        ]
        for _ in range(segment.num_steps):
            steps = [next(loader) for loader in loaders]
            assert len({len(step) for step in steps}) == 1, "every rank does as many forward passes"
            batches.append(global_batch(steps))
        cursors = {loader.cursor() for loader in loaders}
        assert len(cursors) == 1, "every rank stands at the same place"
        cursor = Cursor.from_json(cursors.pop().to_json())
        for loader in loaders:
            loader.close()
    assert cursor is not None
    return batches, cursor


def reference(sources: list[StreamSource], stream: StreamSettings, num_samples: int) -> list[int]:
    """Example indexes of the stream, one sample at a time, from the definitions."""
    readers = [SplitReader(source.folder, "train") for source in sources]
    sizes = [len(reader) for reader in readers]
    weights = np.array([source.weight for source in sources]) / sum(source.weight for source in sources)
    counts = np.floor(weights * PERIOD).astype(int)
    while counts.sum() < PERIOD:
        counts[np.argmax(weights * PERIOD - counts)] += 1
    places = sorted(((i + 0.5) / counts[k], k) for k in range(len(sources)) for i in range(counts[k]))
    taken = [0] * len(sources)
    result = []
    for position in range(num_samples):
        source = places[position % PERIOD][1]
        order = SampleOrder(
            readers[source].shard_sizes.tolist(), int(hash_key(stream.seed, source)[0]), stream.shuffle_window_shards
        )
        number = int(order.sample_numbers(np.array([taken[source]]))[0])
        result.append(sum(sizes[:source]) + number)
        taken[source] += 1
    return result


@given(
    mixture=MIXTURES,
    segments=SEGMENTS,
    batch=st.sampled_from([5, 16, 24, 48]),
    micro=st.integers(1, 6),
    seed=st.integers(0, 99),
    window=st.sampled_from([0, 1, 3]),
)
@settings(max_examples=25, deadline=None)
def test_global_batches_are_those_of_one_process_on_any_ranks_and_threads(
    folders: dict[str, Path],
    mixture: dict[str, float],
    segments: list[Segment],
    batch: int,
    micro: int,
    seed: int,
    window: int,
) -> None:
    sources = [StreamSource(folders[name], weight) for name, weight in mixture.items()]
    stream = StreamSettings(batch, micro, seed=seed, shuffle_window_shards=window)
    found, cursor = run(sources, stream, segments)
    num_samples = batch * sum(segment.num_steps for segment in segments)
    assert cursor.samples_seen == num_samples
    assert [index for rows in found for index, _ in rows] == reference(sources, stream, num_samples)


@given(segments=SEGMENTS, packs=st.booleans(), buckets=st.sampled_from([1, 3]), micro=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_packing_and_length_buckets_keep_the_promise(
    folders: dict[str, Path], segments: list[Segment], packs: bool, buckets: int, micro: int
) -> None:
    sources = [StreamSource(folders["a"], 1.0), StreamSource(folders["b"], 2.0)]
    stream = StreamSettings(12, micro, seed=4, packs_examples=packs, row_tokens=130, length_buckets=buckets)
    total = sum(segment.num_steps for segment in segments)
    found, _ = run(sources, stream, segments)
    alone, _ = run(sources, stream, [Segment(total, 1, 0)])
    assert found == alone


def test_several_epochs_miss_nothing_and_repeat_nothing(folders: dict[str, Path]) -> None:
    # 37 samples in batches of 8: batches cross the ends of epochs, and the run stops in the middle of each.
    stream = StreamSettings(8, 2, seed=1)
    segments = [Segment(3, 2, 1), Segment(4, 8, 0), Segment(2, 1, 2), Segment(7, 4, 4), Segment(21, 16, 0)]
    found, cursor = run([StreamSource(folders["a"])], stream, segments)
    indexes = [index for rows in found for index, _ in rows]
    assert cursor.samples_seen == len(indexes) == 37 * 8
    epochs = [indexes[start : start + 37] for start in range(0, len(indexes), 37)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert all(one != two for one, two in pairwise(epochs))


def test_another_batch_size_goes_on_at_the_same_sample(folders: dict[str, Path]) -> None:
    sources = [StreamSource(folders["b"])]
    small, large = StreamSettings(8, 2, seed=1), StreamSettings(20, 5, seed=1)
    first, cursor = run(sources, small, [Segment(3, 2, 0)])
    with build_loader(sources, "train", large, cursor=cursor) as loader:
        second = global_batch([next(loader)])
    indexes = [index for rows in first for index, _ in rows] + [index for index, _ in second]
    assert indexes == reference(sources, small, 44)
