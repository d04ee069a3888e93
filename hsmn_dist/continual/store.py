"""Save and load A, mu and R by parameter name and flat range; what one world size wrote, any other reads.

Each rank writes one safetensors file with the ranges it owns (under ZeRO stage 0, where every rank holds everything, the
ranks split the work). The manifest comes last: names, shapes, hashes, which file holds which range, and how each task was
measured; so a rank reads and hashes only the files that it needs.
A store that is replaced stays whole until the new manifest takes the old one's place: files of two saves have different names.
No pickle anywhere, so a store from elsewhere cannot run code.

Source: continual.md section 4.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hsmn_dist.continual.ewc import EwcMemory, ShardMemory, TaskRecord, check_matches, mismatch_error, model_digest
from hsmn_dist.distributed.collectives import barrier, broadcast_object
from hsmn_dist.distributed.shards import ParamShard, owned_range
from hsmn_dist.distributed.world import World
from hsmn_dist.foundation.errors import CheckpointError
from hsmn_dist.foundation.files import file_problem, is_inside, read_json, write_manifest

MANIFEST = "manifest.json"
FORMAT = "hsmn_dist.ewc"
FORMAT_VERSION = 2


@dataclass(frozen=True)
class _Piece:
    """One stored range: elements [start, stop) of parameter `name` lie in `file` under `key`."""

    file: str
    key: str
    name: str
    start: int
    stop: int
    residual: float


def save_store(folder: Path, memory: EwcMemory, world: World, num_copies: int = 1) -> None:
    """Write this rank's ranges and, when every rank has, the manifest. Collective: all ranks call it.

    Args:
        folder: absent, or a store that this one replaces.
        memory: this rank's memory.
        world: rank and world size.
        num_copies: how many ranks hold each element (world size under ZeRO stage 0, else 1).
    """
    if world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    save = broadcast_object(secrets.token_hex(4))
    write_rank_file(folder, memory, world.rank, world.world_size, num_copies, save)
    barrier()
    if world.rank == 0:
        finish_store(folder, memory, world.world_size, save)
    barrier()


def rank_file(rank: int, save: str = "0") -> str:
    """File name of one rank's ranges; `save` sets the files of one save apart from those that it replaces."""
    return f"shard_{rank:05d}_{save}.safetensors"


def write_rank_file(
    folder: Path, memory: EwcMemory, rank: int, world_size: int, num_copies: int = 1, save: str = "0"
) -> None:
    """Write the ranges of one rank; the store does not exist until `finish_store`."""
    tensors: dict[str, Tensor] = {}
    pieces = []
    for index, shard in enumerate(memory.shards):
        start, stop, residual = shard.start, shard.stop, shard.residual
        if num_copies > 1:
            low, high = owned_range(stop - start, rank, world_size)
            start, stop = shard.start + low, shard.start + high
            residual = residual if low == 0 else 0.0  # all copies are equal: one of them counts
        if stop <= start:
            continue
        inside = slice(start - shard.start, stop - shard.start)
        key = f"{index:06d}"
        # .clone(): safetensors refuses tensors that share storage, and a narrow of a flat buffer does.
        tensors[f"precision.{key}"] = shard.precision[inside].detach().cpu().clone()
        tensors[f"centre.{key}"] = shard.centre[inside].detach().cpu().clone()
        pieces.append({"key": key, "name": shard.name, "start": start, "stop": stop, "residual": residual})
    save_file(tensors, folder / rank_file(rank, save), metadata={"pieces": json.dumps(pieces)})


def finish_store(folder: Path, memory: EwcMemory, world_size: int, save: str = "0") -> None:
    """Hash every rank's file, write the manifest last, and remove the files of the save before."""
    shapes = {shard.name: list(shard.shape) for shard in memory.shards}
    files = [rank_file(rank, save) for rank in range(world_size)]
    extra = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "world_size": world_size,
        "parameters": shapes,
        "num_parameters": sum(_numel(shape) for shape in shapes.values()),
        "model_digest": model_digest(shapes),
        "tasks": memory.records(),
        "pieces": {file: _header(folder / file) for file in files},
    }
    write_manifest(folder, MANIFEST, files, extra)
    for stale in folder.glob("shard_*.safetensors"):
        if stale.name not in files:
            stale.unlink(missing_ok=True)


def load_store(folder: Path, shards: Sequence[ParamShard]) -> EwcMemory:
    """The memory for exactly these shards, whatever world size and ZeRO stage wrote it. No communication.

    Raises:
        CheckpointError: no manifest, damaged or missing files, another model's parameters, ranges that do not cover every
            element once, or values that no penalty can have.
    """
    manifest = read_manifest(folder)
    stored = {name: tuple(shape) for name, shape in manifest["parameters"].items()}
    wanted = {shard.name: shard.shape for shard in shards}
    if stored != wanted:
        raise mismatch_error(str(folder), stored, wanted)
    pieces = _pieces(folder, manifest)
    _check_coverage(folder, stored, pieces)
    memory = EwcMemory.empty(shards)
    wanted_files = {
        piece.file
        for shard in memory.shards
        for piece in pieces[shard.name]
        if piece.start < shard.stop and shard.start < piece.stop
    }
    _verify(folder, manifest, sorted(wanted_files))
    try:
        memory.tasks = [TaskRecord(**record) for record in manifest["tasks"]]
        opened = {file: safe_open(folder / file, framework="pt") for file in wanted_files}
        for shard in memory.shards:
            _fill(shard, pieces[shard.name], opened)
    except (SafetensorError, TypeError, ValueError, RuntimeError) as error:
        raise _damaged(folder, f"holds no tasks and ranges as this program writes them ({error})") from error
    check_matches(memory, shards)
    for shard in memory.shards:
        _check_values(folder, shard)
    return memory


def _check_values(folder: Path, shard: ShardMemory) -> None:
    """Refuse what would poison every later step: hashes only say that these bytes were written."""
    is_sound = math.isfinite(shard.residual) and shard.residual >= 0
    if shard.precision.numel():
        low, high = (float(bound) for bound in torch.aminmax(shard.precision))
        is_sound = is_sound and math.isfinite(high) and low >= 0 and bool(torch.isfinite(shard.centre).all())
    if not is_sound:
        raise CheckpointError(
            f"{folder}: Fisher or anchor of {shard.name} [{shard.start}, {shard.stop}) is negative or not finite",
            allowed="finite anchors, and finite importances of 0 and above",
            action="take the Fisher again from weights that are finite, or train without it (continual.method: none)",
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a store: parameters, tasks, hashes.

    Raises:
        CheckpointError: it is absent, or of another kind or a newer version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: no {MANIFEST}: the anchor and Fisher of the earlier stages are missing or were never completed",
            allowed="a store whose manifest was written last",
            action="finish the earlier stage first, or train without it (continual.method: none)",
        )
    manifest: dict[str, Any] = read_json(path)
    if not isinstance(manifest, dict):
        raise _damaged(path, "is no record of a store")
    if manifest.get("format") != FORMAT or manifest.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format {manifest.get('format')!r} version {manifest.get('version')!r}",
            allowed=f"format {FORMAT!r} version {FORMAT_VERSION}",
            action="take the Fisher again with this program",
        )
    kinds = {"files": dict, "parameters": dict, "tasks": list, "pieces": dict}
    if not all(isinstance(manifest.get(key), kind) for key, kind in kinds.items()) or not all(
        is_inside(file) for file in manifest["files"]
    ):
        raise _damaged(path, "has no files, parameters or tasks as this program writes them")
    return manifest


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _header(path: Path) -> list[dict[str, Any]]:
    """What `write_rank_file` noted of the ranges in its file."""
    with safe_open(path, framework="pt") as opened:
        listed: list[dict[str, Any]] = json.loads(opened.metadata()["pieces"])
    return listed


def _pieces(folder: Path, manifest: dict[str, Any]) -> dict[str, list[_Piece]]:
    """The stored ranges of each parameter, in order."""
    pieces: dict[str, list[_Piece]] = {name: [] for name in manifest["parameters"]}
    try:
        for file, listed in manifest["pieces"].items():
            for entry in listed:
                start, stop = int(entry["start"]), int(entry["stop"])
                piece = _Piece(file, str(entry["key"]), entry["name"], start, stop, float(entry["residual"]))
                pieces[piece.name].append(piece)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(folder / MANIFEST, f"has ranges that this program does not write ({error!r})") from error
    for held in pieces.values():
        held.sort(key=lambda piece: piece.start)
    return pieces


def _check_coverage(folder: Path, shapes: dict[str, tuple[int, ...]], pieces: dict[str, list[_Piece]]) -> None:
    for name, shape in shapes.items():
        reached = 0
        for piece in pieces[name]:
            if piece.start != reached:
                break
            reached = piece.stop
        if reached != _numel(shape):
            raise _damaged(folder, f"elements of {name} are covered up to {reached} of {_numel(shape)}")


def _verify(folder: Path, manifest: dict[str, Any], files: Sequence[str]) -> None:
    for file in files:
        entry = manifest["files"].get(file)
        if not isinstance(entry, dict):
            raise _damaged(folder / file, "is not in the manifest's list of files")
        problem = file_problem(folder / file, entry.get("sha256", ""), entry.get("bytes", -1))
        if problem:
            raise _damaged(folder / file, problem)


def _damaged(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {problem}",
        allowed="the bytes that were written",
        action="restore the folder from a copy, or run the stage that wrote it again",
    )


def _fill(shard: ShardMemory, pieces: Sequence[_Piece], opened: dict[str, Any]) -> None:
    residual = 0.0
    for piece in pieces:
        residual += piece.residual
        low, high = max(piece.start, shard.start), min(piece.stop, shard.stop)
        if low >= high:
            continue
        for what, target in (("precision", shard.precision), ("centre", shard.centre)):
            source = opened[piece.file].get_slice(f"{what}.{piece.key}")[low - piece.start : high - piece.start]
            target[low - shard.start : high - shard.start] = source.to(device=target.device, dtype=target.dtype)
    # R belongs to the whole parameter; the one rank that owns its first element counts it.
    shard.residual = residual if shard.start == 0 and shard.stop > 0 else 0.0
