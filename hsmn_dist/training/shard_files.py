"""An engine's state on disk: per parameter shard its fp32 master value and its optimizer state, in safetensors.

Unusual: the format knows flat ranges and nothing of ZeRO, so what 2 ranks saved at stage 3 can be read by 1 or 4 ranks at any
stage, and by the one-process engine; at the same world size the state comes back bit for bit. Nothing is pickled. Each rank
writes `rank_NNNNN.safetensors`; the checkpoint's manifest (hashes, written last) is the caller's, and where it is there only files
that it lists are read. A header is typed and bounded before anything is done by it, for hashes show damage and not authorship.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from hsmn_dist.distributed.shards import ParamShard
from hsmn_dist.foundation.errors import CheckpointError
from hsmn_dist.foundation.param_role import ParamRole
from hsmn_dist.training.checkpoint_state import MANIFEST, is_count, read_listing

VALUE = "value"
STATE_ALONE = "@state"
FORMAT = 1
_FILE_NAME = re.compile(r"^rank_\d{5,}\.safetensors$")
_SCALAR_DTYPES = {
    name: getattr(torch, name)
    for name in ("bool", "uint8", "int8", "int16", "int32", "int64", "bfloat16", "float16", "float32", "float64")
}
_STORED_DTYPES = ("BOOL", "U8", "I8", "I16", "I32", "I64", "BF16", "F16", "F32", "F64")
_ACTION = "use the configuration that the checkpoint was written with, or start the stage anew"


@dataclass
class ShardSlot:
    """A shard and where its optimizer state lives.

    Attributes:
        shard: name, range and fp32 value.
        flat: the tensor that the optimizer holds; several shards may share it.
        offset: where the shard starts in `flat`.
        states: the optimizer's state by tensor.
        holds_value, holds_state: which of the two this slot is saved and loaded for. A matrix whose momentum lives on one
            rank has a slot for each.
    """

    shard: ParamShard
    flat: Tensor
    offset: int
    states: MutableMapping[Tensor, Any] = field(default_factory=dict)
    holds_value: bool = True
    holds_state: bool = True

    def cut(self, tensor: Tensor) -> Tensor:
        """This shard's range of a state tensor of `flat`'s size (a view)."""
        return tensor.view(-1).narrow(0, self.offset, self.shard.num_elements)


def shard_file(folder: Path, rank: int) -> Path:
    """Where a rank writes."""
    return folder / f"rank_{rank:05d}.safetensors"


def snapshot(slots: Sequence[ShardSlot], frozen: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Copies of every shard's value and state on the CPU, and the header that describes them.

    `frozen` are whole parameters without optimizer state; one rank gives them, the others give none.

    The copies stay as they are while training goes on, so a slow disk can be served from another thread.
    """
    tensors: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    for slot in slots:
        shard = slot.shard
        if not shard.num_elements:
            continue
        scalars: dict[str, Any] = {}
        name = shard.name if slot.holds_value else f"{shard.name}{STATE_ALONE}"
        if slot.holds_value:
            tensors[f"{VALUE}:{name}"] = _copy(shard.value)
        state = slot.states.get(slot.flat, {}) if slot.holds_state else {}
        for key, entry in state.items():
            if isinstance(entry, Tensor) and entry.dim() > 0:
                _check_elementwise(shard.name, key, entry, slot.flat)
                tensors[f"{key}:{name}"] = _copy(slot.cut(entry))
            elif isinstance(entry, Tensor):
                scalars[key] = {"value": entry.item(), "dtype": str(entry.dtype).removeprefix("torch.")}
            else:
                scalars[key] = {"value": entry, "dtype": ""}
        entries[name] = {"start": shard.start, "stop": shard.stop, "shape": shard.shape, "scalars": scalars}
    for name, tensor in frozen.items():
        tensors[f"{VALUE}:{name}"] = _copy(tensor.float().view(-1))
        entries[name] = {"start": 0, "stop": tensor.numel(), "shape": tuple(tensor.shape), "scalars": {}}
    return tensors, json.dumps({"format": FORMAT, "shards": entries})


def _check_elementwise(name: str, key: str, entry: Tensor, flat: Tensor) -> None:
    assert entry.numel() == flat.numel(), f"state {key} of {name} has {entry.numel()} elements, not {flat.numel()}"


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def write_snapshot(folder: Path, rank: int, tensors: dict[str, Tensor], header: str) -> None:
    """Write what `snapshot` took; a rank that owns nothing writes no file.

    Raises:
        OSError: the disk is full or fails; safetensors says which in its message only.
    """
    if not tensors:
        return
    path = shard_file(folder, rank)
    try:
        save_file(tensors, path, metadata={"hsmn_dist": header})
    except safetensors.SafetensorError as error:
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            number = int(found.group(1))
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


@dataclass
class _Piece:
    start: int
    stop: int
    file: Any
    keys: list[str]
    scalars: dict[str, Any]
    shape: tuple[int, ...]


def read_into(folder: Path, slots: Sequence[ShardSlot], frozen: Mapping[str, Tensor]) -> None:
    """Fill the shards, the optimizer's state and whole `frozen` tensors from a folder that any number of ranks wrote.

    Raises:
        CheckpointError: a parameter is missing, has another shape, or its ranges leave a gap.
    """
    pieces = _open(folder)
    slots = [*slots, *(_frozen_slot(name, tensor) for name, tensor in frozen.items())]
    wanted = {slot.shard.name for slot in slots}
    if unknown := sorted(set(pieces) - wanted):
        raise CheckpointError(
            f"{folder}: holds parameters that the model has not: {unknown[:5]}",
            allowed="the parameters of the model in training",
            action=_ACTION,
        )
    states: dict[int, dict[str, Any]] = {}
    holders = {id(slot.flat): slot for slot in slots if slot.holds_state}
    for slot in slots:
        if slot.shard.name not in pieces:
            raise CheckpointError(
                f"{folder}: has no parameter {slot.shard.name}",
                allowed="the parameters of the model in training",
                action=_ACTION,
            )
        _fill(folder, slot, pieces[slot.shard.name], states.setdefault(id(slot.flat), {}))
    for key, slot in holders.items():
        slot.states.pop(slot.flat, None)
        if states[key]:
            slot.states[slot.flat] = states[key]


def _frozen_slot(name: str, tensor: Tensor) -> ShardSlot:
    flat = tensor.view(-1)
    return ShardSlot(ParamShard(name, ParamRole.VECTOR, "", tuple(tensor.shape), 0, tensor.numel(), flat), flat, 0)


def _open(folder: Path) -> dict[str, list[_Piece]]:
    paths = _paths(folder)
    if not paths:
        raise CheckpointError(
            f"{folder}: no rank_*.safetensors", allowed="a checkpoint's engine folder", action="use another checkpoint"
        )
    pieces: dict[str, list[_Piece]] = {}
    for path in paths:
        try:
            file = safetensors.safe_open(path, framework="pt")
            header = json.loads(file.metadata()["hsmn_dist"])
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: not a shard file ({error})",
                allowed="a file written whole by this program",
                action="use an older complete checkpoint",
            ) from error
        found = header.get("format") if isinstance(header, dict) else None
        if type(found) is not int or found != FORMAT:
            raise CheckpointError(
                f"{path}: format {found!r:.80}", allowed=f"format {FORMAT}", action="use the version that wrote it"
            )
        for name, piece in _pieces(path, file, header.get("shards")).items():
            pieces.setdefault(name.removesuffix(STATE_ALONE), []).append(piece)
    return pieces


def _paths(folder: Path) -> list[Path]:
    """The shard files that the manifest lists; of a folder without a manifest, all of them."""
    if (folder / MANIFEST).is_file():
        return [folder / name for name in sorted(read_listing(folder).files) if _FILE_NAME.match(name)]
    return sorted(folder.glob("rank_*.safetensors"))


def _pieces(path: Path, file: Any, shards: Any) -> dict[str, _Piece]:
    """The shards of one file, by the names in its header; every tensor belongs to one and has its size.

    Raises:
        CheckpointError: the header is not one that this program writes, or does not fit the tensors.
    """
    if not isinstance(shards, dict):
        raise _not_ours(path, "its header lists no shards")
    keys: dict[str, list[str]] = {}
    for key in file.keys():  # noqa: SIM118  (not a dict)
        keys.setdefault(key.partition(":")[2], []).append(key)
    if unnamed := sorted(keys.keys() - shards.keys()):
        raise _not_ours(path, f"its header does not speak of the tensors of {unnamed[:3]!r:.80}")
    pieces = {}
    for name, entry in shards.items():
        if not _is_shard(entry):
            raise _not_ours(path, f"its header has no range, shape and numbers for {name!r:.80}")
        piece = _Piece(entry["start"], entry["stop"], file, keys.get(name, []), entry["scalars"], tuple(entry["shape"]))
        for key in piece.keys:
            part = file.get_slice(key)
            is_value = key.startswith(f"{VALUE}:")
            dtypes = ("F32",) if is_value else _STORED_DTYPES
            if part.get_shape() != [piece.stop - piece.start] or part.get_dtype() not in dtypes:
                raise _not_ours(path, f"the tensor {key!r:.80} is not {piece.stop - piece.start} numbers in a row")
        pieces[name] = piece
    return pieces


def _is_shard(entry: Any) -> bool:
    if not isinstance(entry, dict) or not {"start", "stop", "shape", "scalars"} <= entry.keys():
        return False
    start, stop, shape, scalars = entry["start"], entry["stop"], entry["shape"], entry["scalars"]
    return (
        isinstance(shape, list)
        and all(map(is_count, shape))
        and is_count(start)
        and is_count(stop)
        and start <= stop <= math.prod(shape)
        and isinstance(scalars, dict)
        and all(map(_is_scalar, scalars.values()))
    )


def _is_scalar(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"value", "dtype"}:
        return False
    value, dtype = entry["value"], entry["dtype"]
    if dtype == "":
        return value is None or type(value) in (bool, int, float)
    return isinstance(dtype, str) and dtype in _SCALAR_DTYPES and type(value) in (bool, int, float)


def _scalar(folder: Path, name: str, entry: dict[str, Any]) -> Any:
    if not entry["dtype"]:
        return entry["value"]
    try:
        return torch.tensor(entry["value"], dtype=_SCALAR_DTYPES[entry["dtype"]])
    except (RuntimeError, ValueError, OverflowError) as error:  # a number that the type cannot hold
        raise _not_ours(folder, f"a number of {name} is {entry['value']!r:.40} as {entry['dtype']}") from error


def _not_ours(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {problem}",
        allowed="a checkpoint written whole by this program",
        action="remove that checkpoint; an older complete one is used",
    )


def _fill(folder: Path, slot: ShardSlot, pieces: list[_Piece], state: dict[str, Any]) -> None:
    shard = slot.shard
    for piece in pieces:
        if tuple(shard.shape) != piece.shape:
            raise CheckpointError(
                f"{folder}: {shard.name} is {list(piece.shape)} there and {list(shard.shape)} in the model",
                allowed="equal shapes",
                action=_ACTION,
            )
    for piece in pieces if slot.holds_state else []:
        for key, scalar in piece.scalars.items():
            state[key] = _scalar(folder, shard.name, scalar)
    covered: list[tuple[int, int]] = []
    for piece in pieces:
        start, stop = max(piece.start, shard.start), min(piece.stop, shard.stop)
        if start >= stop:
            continue
        for key in piece.keys:
            kind = key.split(":", 1)[0]
            if not (slot.holds_value if kind == VALUE else slot.holds_state):
                continue
            if kind == VALUE:
                covered.append((start, stop))
            part = piece.file.get_slice(key)[start - piece.start : stop - piece.start]
            _target(folder, slot, kind, state).narrow(0, start - shard.start, stop - start).copy_(part)
    if slot.holds_value and not _is_whole(covered, shard.start, shard.stop):
        num_there = sum(stop - start for start, stop in covered)
        raise CheckpointError(
            f"{folder}: {num_there} of {shard.num_elements} elements of {shard.name} [{shard.start}:{shard.stop}] are there",
            allowed="every element exactly once",
            action="use an older complete checkpoint",
        )


def _is_whole(ranges: list[tuple[int, int]], start: int, stop: int) -> bool:
    """Whether ranges cover [start, stop) without a gap and without an overlap."""
    reached = start
    for first, last in sorted(ranges):
        if first != reached:
            return False
        reached = last
    return reached == stop


def _target(folder: Path, slot: ShardSlot, kind: str, state: dict[str, Any]) -> Tensor:
    if kind == VALUE:
        return slot.shard.value
    if kind not in state:
        state[kind] = torch.zeros_like(slot.flat, requires_grad=False)
    if not isinstance(state[kind], Tensor) or state[kind].numel() != slot.flat.numel():
        raise _not_ours(folder, f"the state {kind!r:.40} of {slot.shard.name} is a number and a tensor")
    return slot.cut(state[kind])


def weights_alone(tensors: Mapping[str, Tensor], header: str) -> tuple[dict[str, Tensor], str]:
    """A snapshot without optimizer state."""
    facts = json.loads(header)
    for entry in facts["shards"].values():
        entry["scalars"] = {}
    return {key: value for key, value in tensors.items() if key.startswith(f"{VALUE}:")}, json.dumps(facts)
