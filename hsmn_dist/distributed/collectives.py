"""Collectives that do nothing, correctly, when there is one rank.

Unusual: `sum_of_pieces` joins disjoint flat pieces by adding their bit patterns as integers, so that what was sharded comes
back bit for bit (adding floats would turn -0.0 into 0.0).
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
Group = dist.ProcessGroup


def rank_and_world_size() -> tuple[int, int]:
    """This rank and the number of ranks; (0, 1) without a process group."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _is_alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place; returns `tensor`."""
    return _all_reduce(tensor, dist.ReduceOp.SUM)


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Maximum over ranks, in place; returns `tensor`."""
    return _all_reduce(tensor, dist.ReduceOp.MAX)


def _all_reduce(tensor: Tensor, op: Any) -> Tensor:
    if _is_alone():
        return tensor
    if tensor.device.type == "cpu" and not _carries_cpu_tensors(str(dist.get_backend_config())):
        # A group that somebody else formed for GPUs alone (Ray Train's): such numbers travel by the device.
        on_device = tensor.to(torch.device("cuda", torch.cuda.current_device()))
        dist.all_reduce(on_device, op=op)
        return tensor.copy_(on_device)
    dist.all_reduce(tensor, op=op)
    return tensor


def _carries_cpu_tensors(backend_config: str) -> bool:
    """Whether a process group of this configuration ("cpu:gloo,cuda:nccl") takes tensors in host memory."""
    return any(part.startswith("cpu:") or part in ("gloo", "mpi") for part in backend_config.split(","))


def barrier() -> None:
    """Wait for every rank."""
    if not _is_alone():
        dist.barrier()


def broadcast_object(value: T, source: int = 0) -> T:
    """The value that rank `source` gave, on every rank. Small objects only: they are pickled between our own ranks."""
    if _is_alone():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]  # type: ignore[no-any-return]


def all_gather_objects(value: T, group: Group | None = None) -> list[T]:
    """Every rank's value, in rank order, on every rank; over `group` where a thread of its own does the talking."""
    if _is_alone():
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value, group=group)
    return box


def background_group() -> Group | None:
    """A gloo group of all ranks for one background thread, so that its messages cannot meet the training's. Collective."""
    return None if _is_alone() else dist.new_group(backend="gloo")


def any_rank(condition: bool) -> bool:
    """True on all ranks when it is true on one of them."""
    return bool(all_reduce_max(torch.tensor(int(condition))).item())


def sum_of_pieces(whole: Tensor) -> Tensor:
    """Join pieces in place: each rank gives an fp32 tensor that is zero (+0.0) outside the elements it owns.

    No element may be owned by two ranks. The result has the owners' bits.
    """
    if not _is_alone():
        dist.all_reduce(whole.view(torch.int32), op=dist.ReduceOp.SUM)
    return whole
