"""The store: what one world size wrote any other reads; damage and mismatches are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hsmn_dist.continual.ewc import EwcMemory, EwcPenalty, TaskRecord
from hsmn_dist.continual.store import (
    MANIFEST,
    finish_store,
    load_store,
    rank_file,
    read_manifest,
    save_store,
    write_rank_file,
)
from hsmn_dist.distributed.world import World
from hsmn_dist.foundation.errors import CheckpointError
from tests.support.param_shards import random_weights, shards_of

SHAPES = {"a.weight": (5, 3), "b": (7,), "scalar": (), "tiny": (2,)}
RECORD = TaskRecord("first", estimator="sampled", num_examples=8, seed=5, relative_error=0.5)
NUM_TASKS = 3


def memory_at(rank: int, world_size: int, dtype=torch.float32) -> EwcMemory:
    memory = EwcMemory.empty(shards_of(random_weights(0, SHAPES, dtype), rank, world_size))
    for task in range(NUM_TASKS):
        shards = shards_of(random_weights(task, SHAPES, dtype), rank, world_size)
        fisher = random_weights(100 + task, SHAPES, dtype)
        memory.add_task(shards, [fisher[s.name].view(-1)[s.start : s.stop].square() for s in shards], RECORD)
    return memory


def write(folder: Path, world_size: int, num_copies: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(world_size):
        memory = memory_at(rank, world_size) if num_copies == 1 else memory_at(0, 1)
        write_rank_file(folder, memory, rank, world_size, num_copies)
    finish_store(folder, memory, world_size)


@pytest.mark.parametrize("wrote", [1, 2, 4])
@pytest.mark.parametrize("reads", [1, 3, 4])
def test_any_world_size_reads_what_any_other_wrote(tmp_path: Path, wrote: int, reads: int) -> None:
    write(tmp_path, wrote)
    theta = random_weights(9, SHAPES, torch.float32)
    total = 0.0
    for rank in range(reads):
        shards = shards_of(theta, rank, reads)
        loaded, expected = load_store(tmp_path, shards), memory_at(rank, reads)
        assert loaded.tasks == [RECORD] * NUM_TASKS
        for mine, wanted in zip(loaded.shards, expected.shards, strict=True):
            assert torch.equal(mine.precision, wanted.precision) and torch.equal(mine.centre, wanted.centre)
        total += float(EwcPenalty(loaded, 1.0).local_value(shards))
    whole = float(EwcPenalty(memory_at(0, 1), 1.0).local_value(shards_of(theta)))
    assert total == pytest.approx(whole, rel=1e-6)


def test_ranks_that_all_hold_everything_split_the_work(tmp_path: Path) -> None:
    write(tmp_path, 3, num_copies=3)
    held = [sum(t.numel() for t in load_file(tmp_path / rank_file(rank)).values()) for rank in range(3)]
    assert sum(held) == 2 * (15 + 7 + 1 + 2) and max(held) <= 2 * (5 + 3 + 1 + 1)
    shards = shards_of(random_weights(9, SHAPES, torch.float32))
    loaded = load_store(tmp_path, shards)
    for mine, wanted in zip(loaded.shards, memory_at(0, 1).shards, strict=True):
        assert torch.equal(mine.precision, wanted.precision)
        assert mine.residual == pytest.approx(wanted.residual, rel=1e-9)


def test_ranges_of_any_layout_are_read(tmp_path: Path) -> None:
    write(tmp_path, 2)
    whole = memory_at(0, 1)
    shards = shards_of(random_weights(0, SHAPES, torch.float32))
    shards[0].start, shards[0].stop, shards[0].value = 4, 13, shards[0].value[4:13]
    shards[1].start, shards[1].stop, shards[1].value = 7, 7, shards[1].value[7:]
    loaded = load_store(tmp_path, shards)
    assert torch.equal(loaded.shards[0].precision, whole.shards[0].precision[4:13])
    assert loaded.shards[0].residual == 0.0 and loaded.shards[1].precision.numel() == 0


def test_saving_again_replaces_the_store(tmp_path: Path) -> None:
    write(tmp_path, 4)
    save_store(tmp_path, memory_at(0, 1), World())
    first, second = sorted(path.name for path in tmp_path.iterdir())
    assert first == MANIFEST and second.startswith("shard_00000_")
    assert read_manifest(tmp_path)["world_size"] == 1


def test_the_manifest_says_how_the_numbers_were_made(tmp_path: Path) -> None:
    write(tmp_path, 2)
    manifest = read_manifest(tmp_path)
    assert manifest["tasks"][0] == {
        "stage": "first",
        "method": "ewc",
        "estimator": "sampled",
        "num_examples": 8,
        "seed": 5,
        "example_reduction": "mean",
        "num_groups": 0,
        "relative_error": 0.5,
    }
    assert manifest["num_parameters"] == 15 + 7 + 1 + 2
    assert len(manifest["model_digest"]) == 64 and set(manifest["files"]) == {rank_file(0), rank_file(1)}


def test_a_store_without_its_manifest_does_not_exist(tmp_path: Path) -> None:
    write(tmp_path, 2)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="anchor and Fisher"):
        load_store(tmp_path, shards_of(random_weights(0, SHAPES, torch.float32)))


@pytest.mark.parametrize("damage", ["byte", "short", "gone"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    write(tmp_path, 2)
    path = tmp_path / rank_file(1)
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data if damage == "byte" else data[:-8])
    with pytest.raises(CheckpointError, match=rank_file(1)):
        load_store(tmp_path, shards_of(random_weights(0, SHAPES, torch.float32)))


def test_another_models_store_is_refused_with_every_difference(tmp_path: Path) -> None:
    write(tmp_path, 2)
    other = random_weights(0, {"a.weight": (5, 4), "b": (7,), "scalar": (), "extra": (3,)}, torch.float32)
    with pytest.raises(CheckpointError) as caught:
        load_store(tmp_path, shards_of(other))
    message = str(caught.value)
    for part in ("tiny", "extra", "a.weight", "[5, 4]", "[5, 3]"):
        assert part in message


def test_a_store_that_is_being_replaced_stays_whole_until_the_new_manifest(tmp_path: Path) -> None:
    write(tmp_path, 2)
    write_rank_file(tmp_path, memory_at(0, 1), 0, 1, save="later")  # and a crash before finish_store
    shards = shards_of(random_weights(9, SHAPES, torch.float32))
    loaded = load_store(tmp_path, shards)
    for mine, wanted in zip(loaded.shards, memory_at(0, 1).shards, strict=True):
        assert torch.equal(mine.precision, wanted.precision)
    save_store(tmp_path, memory_at(0, 1), World())
    assert len(list(tmp_path.iterdir())) == 2  # what the crash left is gone as well


@pytest.mark.parametrize(
    ("what", "value"), [("precision", float("nan")), ("precision", -1.0), ("centre", float("inf")), ("residual", -2.0)]
)
def test_a_stored_fisher_or_anchor_that_would_poison_every_step_is_refused(
    tmp_path: Path, what: str, value: float
) -> None:
    memory = memory_at(0, 1)
    if what == "residual":
        memory.shards[0].residual = value
    else:
        getattr(memory.shards[0], what)[0] = value
    save_store(tmp_path, memory, World())
    with pytest.raises(CheckpointError, match=r"a\.weight.*negative or not finite"):
        load_store(tmp_path, shards_of(random_weights(0, SHAPES, torch.float32)))


@pytest.mark.parametrize(
    "change",
    [
        {"pieces": {"x": [{}]}},
        {"pieces": {"x": 3}},
        {"tasks": [{"unknown": 1}]},
        {"tasks": [3]},
        {"files": {rank_file(0): {"sha256": "", "bytes": 1}}},
        {"files": {}},
    ],
)
def test_a_manifest_of_another_shape_is_refused_with_its_path(tmp_path: Path, change: dict) -> None:
    write(tmp_path, 1)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, **change}))
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_store(tmp_path, shards_of(random_weights(0, SHAPES, torch.float32)))


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 1)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(CheckpointError, match="version 99"):
        read_manifest(tmp_path)
