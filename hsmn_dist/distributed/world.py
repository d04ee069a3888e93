"""World: which rank this process is, of how many, on which device; and the process group they share.

Unusual: this is the only file of the library that reads the environment (and it sets
LOCAL_RANK where it is missing), and it adopts a process group that somebody else
formed (Ray Train does) in place of forming its own. Whoever starts the ranks sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR
and MASTER_PORT, as torchrun does; with none of them set there is one rank.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist

from hsmn_dist.foundation.errors import ConfigError

DeviceKind = Literal["auto", "cpu", "gpu"]
DEFAULT_TIMEOUT_SECONDS = 1800.0


@dataclass(frozen=True)
class World:
    """One rank's place among the ranks.

    Attributes:
        rank: this process, 0 to world_size - 1.
        local_rank: its place on its own machine.
        world_size: number of ranks.
        device: where its tensors live.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """True on the rank that speaks, logs and writes shared files."""
        return self.rank == 0

    @classmethod
    def place(cls, device: DeviceKind = "auto") -> World:
        """Read this rank's place, without waiting for any other rank.

        Args:
            device: "auto" takes the GPU of this local rank where there is one.

        Raises:
            ConfigError: variables that contradict each other, or "gpu" on a machine without one.
        """
        rank, local_rank, world_size = _read_place()
        return cls(rank, local_rank, world_size, _choose_device(device, local_rank))

    @classmethod
    def from_environment(cls, device: DeviceKind = "auto", timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> World:
        """`place`, then join the process group (gloo on CPU, nccl on GPU) unless it exists already or there is one rank.

        Args:
            device: see `place`.
            timeout_seconds: how long a collective may wait for the other ranks.

        Raises:
            ConfigError: see `place`.
        """
        world = cls.place(device)
        if world.world_size > 1:
            world.join(timeout_seconds)
        return world

    def join(self, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> None:
        """Form the process group, or adopt the one that is there. One rank alone needs no address.

        LOCAL_RANK is set where nobody did, because DeepSpeed refuses to start without it.
        """
        os.environ.setdefault("LOCAL_RANK", str(self.local_rank))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if dist.is_initialized():
            if (dist.get_rank(), dist.get_world_size()) != (self.rank, self.world_size):
                raise ConfigError(
                    f"rank {self.rank} of {self.world_size} in the environment, but the process group that is already "
                    f"there says rank {dist.get_rank()} of {dist.get_world_size()}",
                    allowed="RANK and WORLD_SIZE that agree with the process group",
                    action="start each rank in a process of its own",
                )
            return
        timeout = datetime.timedelta(seconds=timeout_seconds)
        backend = "gloo"
        if self.device.type == "cuda":
            # Objects and CPU tensors go over gloo, so that bookkeeping never waits for the device.
            backend = "cpu:gloo,cuda:nccl"
        if self.world_size == 1:
            store = dist.HashStore()
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group(
                backend, init_method="env://", rank=self.rank, world_size=self.world_size, timeout=timeout
            )

    @staticmethod
    def leave() -> None:
        """End the process group, if there is one."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _read_place() -> tuple[int, int, int]:
    values = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    if dist.is_initialized() and values["RANK"] is None:
        return dist.get_rank(), int(values["LOCAL_RANK"] or 0), dist.get_world_size()
    try:
        rank = int(values["RANK"] or 0)
        local_rank = int(values["LOCAL_RANK"] or 0)
        world_size = int(values["WORLD_SIZE"] or 1)
    except ValueError as error:
        raise _bad_place(values) from error
    if not (0 <= rank < world_size and 0 <= local_rank <= rank):
        raise _bad_place(values)
    return rank, local_rank, world_size


def _bad_place(values: dict[str, str | None]) -> ConfigError:
    return ConfigError(
        "the environment says " + ", ".join(f"{name}={value}" for name, value in values.items()),
        allowed="whole numbers with 0 <= LOCAL_RANK <= RANK < WORLD_SIZE, or none of the three",
        action="start the ranks with `hsmn-dist run` or torchrun",
    )


def _choose_device(kind: DeviceKind, local_rank: int) -> torch.device:
    num_devices = torch.cuda.device_count() if kind != "cpu" else 0
    if kind == "gpu" and num_devices == 0:
        raise ConfigError(
            "cluster.device is 'gpu' and this rank sees no CUDA device",
            allowed="a machine with a GPU and a CUDA build of torch, or cluster.device 'cpu'",
            action="check CUDA_VISIBLE_DEVICES and `python -c 'import torch; print(torch.version.cuda)'`",
        )
    if num_devices == 0:
        return torch.device("cpu")
    # Ray shows each worker its own GPU alone; torchrun shows all of them to everybody.
    return torch.device("cuda", local_rank % num_devices)
