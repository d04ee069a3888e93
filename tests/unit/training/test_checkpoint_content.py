"""What a checkpoint says is read as if a stranger had written it, though every hash agrees."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from hsmn_dist.distributed.world import World
from hsmn_dist.foundation.errors import CheckpointError
from hsmn_dist.training.checkpoint import MANIFEST, Checkpointer, TrainState
from tests.support.stages import one_rank_engine, train_a_step


def test_an_unknown_key_in_the_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="colour"):
        TrainState.from_json({"step": 1, "colour": "red"})


def rewrite(place: Path, name: str, data: bytes) -> None:
    """Other content under a manifest that agrees with it."""
    (place / name).write_bytes(data)
    manifest = json.loads((place / MANIFEST).read_text())
    manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (place / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state.json", "[]"),
        ("state.json", '{"step": "x"}'),
        ("state.json", '{"step": 1, "validations": [1]}'),
        ("state.json", '{"step": 1, "num_tokens": -1}'),
        ("state.json", '{"step": 1, "best_loss": "low"}'),
        ("state.json", '{"step": 1, "cursor": []}'),
        ("state.json", '{"step": 7}'),
        ("rng_00000.json", "{}"),
        ("rng_00000.json", "[]"),
    ],
)
def test_strange_json_in_a_checkpoint_is_refused_in_words(tmp_path: Path, name: str, content: str) -> None:
    engine = one_rank_engine(tmp_path)
    rewrite(Checkpointer(tmp_path / "c", World()).save(engine, TrainState(step=1)), name, content.encode())
    with pytest.raises(CheckpointError, match="state"):
        Checkpointer(tmp_path / "c", World()).restore(engine)


def test_a_number_of_ranks_is_never_counted_out(tmp_path: Path) -> None:
    engine = one_rank_engine(tmp_path)
    place = Checkpointer(tmp_path / "c", World()).save(engine, TrainState(step=1))
    manifest = json.loads((place / MANIFEST).read_text())
    (place / MANIFEST).write_text(json.dumps({**manifest, "world_size": 2**40}))  # took forever, and memory
    state = Checkpointer(tmp_path / "c", World()).restore(engine)
    assert state is not None and state.step == 1


def test_a_position_beyond_the_words_of_a_random_generator_is_refused(tmp_path: Path) -> None:
    engine = one_rank_engine(tmp_path)
    place = Checkpointer(tmp_path / "c", World()).save(engine, TrainState(step=1))
    states = json.loads((place / "rng_00000.json").read_text())
    states["numpy"][2] = 100_000  # numpy would take it, and read beyond its words
    rewrite(place, "rng_00000.json", json.dumps(states).encode())
    with pytest.raises(CheckpointError, match="generators"):
        Checkpointer(tmp_path / "c", World()).restore(engine)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": None}, "format None"),
        ({"format": True}, "format True"),
        ({"shards": []}, "lists no shards"),
        ({"shards": {}}, "does not speak of"),
        ({"start": "0"}, "no range"),
        ({"start": -1}, "no range"),
        ({"stop": 10**9}, "no range"),
        ({"shape": "abc"}, "no range"),
        ({"stop": 1}, "1 numbers in a row"),
        ({"scalars": {"step": {"value": 1, "dtype": "load"}}}, "no range"),
        ({"scalars": {"step": {"value": "1", "dtype": "int64"}}}, "no range"),
        ({"scalars": {"step": {"value": 10**30, "dtype": "int64"}}}, "as int64"),
        ({"scalars": {"exp_avg": {"value": 1, "dtype": "int64"}}}, "a number and a tensor"),
    ],
)
def test_a_strange_header_of_a_shard_file_is_refused_in_words(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    engine = one_rank_engine(tmp_path)
    train_a_step(engine, 1)
    tensors, text = engine.snapshot()
    header = json.loads(text)
    entry = next(iter(header["shards"].values()))
    for key, value in changes.items():
        (header if key in header else entry)[key] = value
    safetensors.torch.save_file(tensors, tmp_path / "x", metadata={"hsmn_dist": json.dumps(header)})
    place = Checkpointer(tmp_path / "c", World()).save(engine, TrainState(step=1))
    rewrite(place, "rank_00000.safetensors", (tmp_path / "x").read_bytes())
    with pytest.raises(CheckpointError, match=words):
        Checkpointer(tmp_path / "c", World()).restore(engine)


def test_files_that_the_manifest_does_not_list_are_not_read(tmp_path: Path) -> None:
    engine = one_rank_engine(tmp_path)
    place = Checkpointer(tmp_path / "c", World()).save(engine, TrainState(step=1))
    drawn = torch.rand(3)
    (place / "rng_00001.json").write_text("{}")
    (place / "rank_00001.safetensors").write_bytes((place / "rank_00000.safetensors").read_bytes())
    torch.manual_seed(99)
    assert Checkpointer(tmp_path / "c", World()).restore(engine) == TrainState(step=1)
    assert torch.equal(torch.rand(3), drawn)


@pytest.mark.parametrize("missing", ["state.json", "all"])
def test_a_manifest_that_does_not_vouch_for_the_state_makes_no_sound_checkpoint(tmp_path: Path, missing: str) -> None:
    engine = one_rank_engine(tmp_path)
    place = Checkpointer(tmp_path / "c", World()).save(engine, TrainState(step=1))
    manifest = json.loads((place / MANIFEST).read_text())
    manifest["files"] = {} if missing == "all" else {n: e for n, e in manifest["files"].items() if n != missing}
    (place / MANIFEST).write_text(json.dumps(manifest))
    assert Checkpointer(tmp_path / "c", World()).restore(engine) is None


def test_a_shard_file_that_is_a_pickle_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    engine = one_rank_engine(tmp_path)
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {marker}",)

    folder = tmp_path / "evil"
    folder.mkdir()
    torch.save({"value": Evil()}, folder / "rank_00000.safetensors")
    with pytest.raises(CheckpointError, match="not a shard file"):
        engine.load(folder)
    assert not marker.exists()


def test_weights_of_another_model_are_refused_by_name_and_shape(tmp_path: Path) -> None:
    engine = one_rank_engine(tmp_path)
    weights = engine.state_dict()
    with pytest.raises(CheckpointError, match="missing"):
        engine.load_weights({name: value for name, value in weights.items() if "head" not in name})
    with pytest.raises(CheckpointError, match=r"head.weight"):
        engine.load_weights({**weights, "head.weight": torch.zeros(2, 2)})
    folder = tmp_path / "saved"
    folder.mkdir()
    engine.save(folder)
    path = folder / "rank_00000.safetensors"
    header = path.read_bytes()
    path.write_bytes(header.replace(b"head.weight", b"tail.weight"))
    with pytest.raises(CheckpointError, match=r"tail.weight"):
        engine.load(folder)
