"""The loader: what a batch holds, what a cursor promises, and what damage does to a stream."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from hsmn_dist.config.data import DataConfig
from hsmn_dist.data.shards.reader import DamagedSample, SplitReader
from hsmn_dist.data.stream.collate import Row, collate, collate_packed
from hsmn_dist.data.stream.cursor import Cursor
from hsmn_dist.data.stream.loader import build_loader, iter_split
from hsmn_dist.data.stream.packing import pack_rows
from hsmn_dist.data.stream.plan import StreamSettings, StreamSource
from hsmn_dist.data.tokenizer import ByteTokenizer
from hsmn_dist.foundation.errors import DataError
from hsmn_dist.models.contract import ModelInput
from hsmn_dist.tracking import metric_names
from tests.support.shards import example_text, write_folder

SETTINGS = StreamSettings(global_batch_examples=8, micro_batch_examples=2, seed=5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "demo", 50)


def texts(batch: dict[str, torch.Tensor]) -> list[tuple[str, str]]:
    tokenizer = ByteTokenizer()
    rows = []
    for row in range(len(batch["target_ids"])):
        context = batch["context_ids"][row][batch["context_mask"][row]].tolist()
        rows.append((tokenizer.decode(context), tokenizer.decode(batch["target_ids"][row].tolist())))
    return rows


def test_a_batch_fits_the_models_input_and_holds_the_text(folder: Path) -> None:
    with build_loader([StreamSource(folder)], "train", SETTINGS) as loader:
        micro_batches = next(loader)
    assert len(micro_batches) == 4
    for batch in micro_batches:
        fields = {key: value for key, value in batch.items() if key != "example_index"}
        inputs = ModelInput(**fields)
        assert inputs.context_ids.dtype == inputs.target_ids.dtype == torch.int64
        assert inputs.context_mask.dtype == inputs.loss_mask.dtype == torch.bool
        assert (inputs.target_ids[~inputs.loss_mask] == 0).all()
        assert (inputs.context_ids[~inputs.context_mask] == 0).all()
        ends = inputs.target_ids[torch.arange(2), inputs.loss_mask.sum(1) - 1]
        assert (ends == ByteTokenizer.eos_id).all()
        for (context, target), index in zip(texts(batch), batch["example_index"].tolist(), strict=True):
            assert (context, target) == example_text("demo", index)


def test_settings_come_from_the_configuration() -> None:
    data = DataConfig(loader_workers=3, length_buckets=2, max_context_tokens=10, max_target_tokens=5)
    settings = StreamSettings.from_config(data, global_batch_examples=4, micro_batch_examples=2, seed=1)
    assert (settings.loader_workers, settings.length_buckets, settings.row_tokens) == (3, 2, 15)
    assert settings.replay_fraction == 0.0


def test_a_cursor_goes_through_json_and_refuses_anything_else() -> None:
    cursor = Cursor(40, 5, 7, 99, 1)
    assert Cursor.from_json(cursor.to_json()) == cursor
    for value in ({}, None, {**cursor.to_json(), "samples_seen": -1}, {**cursor.to_json(), "version": 2}):
        with pytest.raises(DataError):
            Cursor.from_json(value)


def test_a_cursor_of_other_data_or_seed_is_refused(folder: Path, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", 30, name="other")
    loader = build_loader([StreamSource(folder)], "train", SETTINGS)
    next(loader)
    cursor = loader.cursor()
    with pytest.raises(DataError, match="other data"):
        build_loader([StreamSource(other)], "train", SETTINGS, cursor=cursor)
    with pytest.raises(DataError, match="seed"):
        build_loader([StreamSource(folder)], "train", StreamSettings(8, 2, seed=6), cursor=cursor)


def test_a_moved_folder_keeps_its_cursor(folder: Path, tmp_path: Path) -> None:
    loader = build_loader([StreamSource(folder)], "train", SETTINGS)
    next(loader)
    expected = next(loader)[0]["example_index"].tolist()
    loader = build_loader([StreamSource(folder)], "train", SETTINGS)
    next(loader)
    moved = folder.rename(tmp_path / "elsewhere")
    again = build_loader([StreamSource(moved)], "train", SETTINGS, cursor=loader.cursor())
    assert next(again)[0]["example_index"].tolist() == expected


def test_an_empty_or_unknown_split_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "none", 0)
    with pytest.raises(DataError, match="empty"):
        build_loader([StreamSource(folder)], "train", SETTINGS)
    with pytest.raises(DataError, match="no split"):
        build_loader([StreamSource(folder)], "validation", SETTINGS)


def test_replay_takes_its_share_of_every_batch(tmp_path: Path) -> None:
    new, old = write_folder(tmp_path / "new", 40, name="new"), write_folder(tmp_path / "old", 40, name="old")
    settings = StreamSettings(20, 20, seed=1, replay=(StreamSource(old),), replay_fraction=0.2)
    with build_loader([StreamSource(new)], "train", settings) as loader:
        for _ in range(12):
            (batch,) = next(loader)
            num_old = sum(context.startswith("old") for context, _ in texts(batch))
            assert 3 <= num_old <= 5
        assert loader.stats.replay_ratio == pytest.approx(0.2, abs=0.01)
        assert set(texts(batch)) <= {example_text(n, i) for n in ("new", "old") for i in range(40)}


def test_metrics_have_the_trackers_names(folder: Path) -> None:
    with build_loader([StreamSource(folder)], "train", SETTINGS) as loader:
        next(loader)
        metrics = loader.metrics()
    assert 0 < metrics[metric_names.DATA_PADDING] < 1 and metrics[metric_names.DATA_REPLAY] == 0
    assert metrics["data/quarantined_count"] == 0 and metrics["data/wait_seconds"] == loader.wait_seconds > 0


# iter_split


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("limit", [None, 1, 10, 17, 500])
def test_every_rank_yields_as_many_batches_and_together_the_first_examples(
    folder: Path, world_size: int, limit: int | None
) -> None:
    ranks = [list(iter_split(folder, "train", 4, rank, world_size, limit)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    seen: list[int] = []
    for step in range(len(ranks[0])):
        for batches in ranks:
            batch = batches[step]
            assert len(batch["target_ids"]) == 4
            real = batch["example_index"] >= 0
            assert (batch["loss_mask"].any(1) == real).all(), "rows beyond the end are never scored"
            assert batch["context_mask"].any(1).all(), "and still have a token to attend to"
            seen.extend(batch["example_index"][real].tolist())
    assert seen == list(range(min(limit or 50, 50)))


def test_a_shuffled_part_of_a_split_is_the_same_on_every_rank_count(folder: Path) -> None:
    def chosen(world_size: int) -> list[int]:
        ranks = [list(iter_split(folder, "train", 3, r, world_size, 20, shuffle_seed=9)) for r in range(world_size)]
        return [i for step in zip(*ranks, strict=True) for b in step for i in b["example_index"].tolist() if i >= 0]

    assert chosen(1) == chosen(2) == chosen(4)
    assert chosen(1) != sorted(chosen(1)) and len(set(chosen(1))) == 20


# Packing and bucketing


def test_packed_rows_hold_every_example_once_within_the_row() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 200)
    rows = pack_rows(lengths, 64)
    assert sorted(example for row in rows for example in row) == list(range(200))
    assert all(lengths[row].sum() <= 64 for row in rows)
    assert len(rows) <= 11 / 9 * np.ceil(lengths.sum() / 64) + 1


def test_an_example_longer_than_a_row_gets_its_own() -> None:
    assert pack_rows(np.array([3, 90, 3]), 10) == [[0, 2], [1]]


def test_packing_scores_the_same_tokens_and_marks_the_examples(folder: Path) -> None:
    packed = StreamSettings(8, 2, seed=5, packs_examples=True, row_tokens=150)
    with (
        build_loader([StreamSource(folder)], "train", SETTINGS) as one,
        build_loader([StreamSource(folder)], "train", packed) as two,
    ):
        plain = [pair for batch in next(one) for pair in texts(batch)]
        batches = next(two)
    found = []
    tokenizer = ByteTokenizer()
    for batch in batches:
        assert batch["context_ids"].shape[1] == 0 and (batch["segment_ids"] > 0).equal(batch["target_ids"] != 0)
        assert not (batch["loss_mask"] & (batch["segment_ids"] == 0)).any()
        for row in range(len(batch["target_ids"])):
            for segment in range(1, int(batch["segment_ids"][row].max()) + 1):
                here = batch["segment_ids"][row] == segment
                ids, scored = batch["target_ids"][row][here], batch["loss_mask"][row][here]
                if scored.any():
                    found.append((tokenizer.decode(ids[~scored].tolist()), tokenizer.decode(ids[scored].tolist())))
    assert sorted(found) == sorted(plain)
    assert sum(len(batch["target_ids"]) for batch in batches) < 8, "several examples share a row"


def test_an_empty_packed_row_is_never_scored() -> None:
    tokens = (np.array([5, 6]), np.array([7, 2]))
    batch = collate_packed([Row([tokens, tokens], 0), Row([])])
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1, 2, 2, 2, 2], [1, 0, 0, 0, 0, 0, 0, 0]]
    assert batch["loss_mask"].tolist() == [[False, False, True, True] * 2, [False] * 8]
    assert collate([Row([tokens]), Row([])])["loss_mask"].tolist() == [[True, True], [False, False]]


def test_length_buckets_save_padding_and_lose_no_sample(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "demo", 96)
    ratios = {}
    for buckets in (1, 6):
        settings = StreamSettings(16, 16, seed=3, length_buckets=buckets)
        with build_loader([StreamSource(folder)], "train", settings) as loader:
            seen = [i for _ in range(6) for batch in next(loader) for i in batch["example_index"].tolist()]
            ratios[buckets] = loader.stats.padding_ratio
        assert sorted(seen) == list(range(96))
    assert ratios[6] < 0.7 * ratios[1]


# Damage under the loader's policy


def damage(folder: Path, sample: int) -> None:
    reader = SplitReader(folder, "train")
    shard = int(np.searchsorted(np.cumsum(reader.shard_sizes), sample, side="right"))
    offset, example_bytes = reader.samples[sample]["offset"], reader.samples[sample]["example_bytes"]
    path = folder / reader.entry.shards[shard].name
    data = bytearray(path.read_bytes())
    data[int(offset) + 512 + (int(example_bytes) + 511) // 512 * 512 + 512 + 5] ^= 1
    path.write_bytes(bytes(data))


def epoch(folder: Path, settings: StreamSettings, world_size: int = 1) -> list[dict[str, torch.Tensor]]:
    batches = []
    for rank in range(world_size):
        with build_loader([StreamSource(folder)], "train", settings, rank, world_size) as loader:
            batches.extend(batch for _ in range(7) for batch in next(loader))
    return batches


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_raises_by_default_and_names_the_sample(folder: Path, workers: int) -> None:
    damage(folder, 17)
    with pytest.raises(DamagedSample, match=r"17 of train.*checksum"):
        epoch(folder, StreamSettings(8, 2, seed=5, loader_workers=workers))


def test_quarantine_passes_over_what_is_damaged_and_counts_it(folder: Path) -> None:
    damage(folder, 17)
    damage(folder, 30)
    settings = StreamSettings(8, 2, seed=5, corrupt_policy="quarantine", quarantine_limit=9)
    with build_loader([StreamSource(folder)], "train", settings) as loader:
        rows = {}
        for _ in range(7):
            for batch in next(loader):
                for index, scored in zip(
                    batch["example_index"].tolist(), batch["loss_mask"].any(1).tolist(), strict=True
                ):
                    rows[index] = scored
        assert loader.stats.num_quarantined == loader.cursor().num_quarantined
        assert 2 <= loader.stats.num_quarantined <= 4
    assert [index for index, scored in rows.items() if not scored] in ([17, 30], [30, 17])


def test_more_damage_than_the_limit_stops_the_stream_also_after_a_resume(folder: Path) -> None:
    reader = SplitReader(folder, "train")
    os.unlink(folder / reader.entry.shards[1].name)
    lost = int(reader.shard_sizes[1])
    enough = StreamSettings(50, 50, seed=5, corrupt_policy="quarantine", quarantine_limit=lost)
    with build_loader([StreamSource(folder)], "train", enough) as loader:
        next(loader)
        assert loader.stats.num_quarantined == lost
        cursor = loader.cursor()
    again = build_loader([StreamSource(folder)], "train", enough, cursor=cursor)
    with again, pytest.raises(DamagedSample, match=f"{2 * lost} damaged samples"):
        next(again)
    short = StreamSettings(50, 50, seed=5, corrupt_policy="quarantine", quarantine_limit=lost - 1)
    with build_loader([StreamSource(folder)], "train", short) as loader, pytest.raises(DamagedSample):
        next(loader)


# Reading ahead


def test_reading_ahead_hides_slow_storage_behind_the_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = SplitReader._read

    def slow(self: SplitReader, numbers: np.ndarray, *spans: np.ndarray) -> list[bytes]:
        time.sleep(0.004 * len(numbers))
        return real(self, numbers, *spans)

    monkeypatch.setattr(SplitReader, "_read", slow)
    waits = {}
    for workers in (0, 2):
        settings = StreamSettings(8, 8, seed=5, loader_workers=workers, prefetch_batches=2)
        with build_loader([StreamSource(folder)], "train", settings) as loader:
            next(loader)
            first = loader.wait_seconds
            for _ in range(6):
                time.sleep(0.05)  # the step
                next(loader)
            waits[workers] = loader.wait_seconds - first
    assert waits[0] > 6 * 8 * 0.004
    assert waits[2] < 0.5 * waits[0]


def test_closing_ends_the_threads(folder: Path) -> None:
    import threading

    loader = build_loader([StreamSource(folder)], "train", StreamSettings(8, 2, seed=5, loader_workers=2))
    next(loader)
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("stream")]
