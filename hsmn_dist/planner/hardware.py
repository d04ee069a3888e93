"""Devices and networks as their makers describe them: memory, dense matrix rates, bandwidth, each with its source.

Unusual: rates are those without sparsity (data sheets print twice as much), and link rates are bytes per second in one
direction (data sheets add both). A CPU has no entry of its own: `measure_cpu` times this machine.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from hsmn_dist.foundation.errors import PlanError
from hsmn_dist.foundation.registry import near_name

GIGA, TERA = 10**9, 10**12


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        name: as in `--device`.
        memory_bytes: what a program may use in all, as sold (the plan leaves a reserve).
        bf16_flops: dense bf16 matrix FLOP/s; 0 when not known.
        fp32_flops: FLOP/s of fp32 matrix products as torch runs them by default (no TF32).
        memory_bytes_per_second: of its own memory.
        link_bytes_per_second: to the other devices of its node, one direction, all links together.
        network: the network that its maker's reference server has.
        source: where the numbers stand.
    """

    name: str
    memory_bytes: int
    bf16_flops: float
    fp32_flops: float
    memory_bytes_per_second: float
    link_bytes_per_second: float
    network: str
    source: str


@dataclass(frozen=True)
class Network:
    """What joins the nodes.

    Attributes:
        name: as in `--network`.
        bytes_per_second_per_gpu: one direction, when each GPU has a network card of its own; else 0.
        bytes_per_second_per_node: one direction, when a node's GPUs share its cards; else 0.
        source: what the number is.
    """

    name: str
    bytes_per_second_per_gpu: float
    bytes_per_second_per_node: float
    source: str

    def node_bytes_per_second(self, gpus_per_node: int) -> float:
        """Bytes per second that leave a node in one direction when `gpus_per_node` GPUs use it."""
        return self.bytes_per_second_per_node or self.bytes_per_second_per_gpu * gpus_per_node


def _device(
    name: str, gigabytes: float, bf16: float, fp32: float, memory: float, link: float, network: str, source: str
) -> Device:
    """Units of a data sheet: GB, TFLOP/s, GB/s."""
    return Device(name, int(gigabytes * GIGA), bf16 * TERA, fp32 * TERA, memory * GIGA, link * GIGA, network, source)


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _device("a100", 80, 312, 19.5, 2039, 300, "infiniband_200", "NVIDIA A100 data sheet (SXM, 80 GB)"),
        _device("a100_40gb", 40, 312, 19.5, 1555, 300, "infiniband_200", "NVIDIA A100 data sheet (SXM, 40 GB)"),
        _device(
            "h100",
            80,
            989.5,
            67,
            3350,
            450,
            "infiniband_400",
            "NVIDIA H100 data sheet (SXM; 1,979 bf16 TFLOP/s with sparsity)",
        ),
        _device(
            "h200",
            141,
            989.5,
            67,
            4800,
            450,
            "infiniband_400",
            "NVIDIA H200 data sheet (SXM; 1,979 bf16 TFLOP/s with sparsity)",
        ),
        _device(
            "b200",
            180,
            2250,
            75,
            7700,
            900,
            "infiniband_400",
            "NVIDIA HGX B200 data sheet, an eighth of the 8-GPU board (36 bf16 PFLOP/s with sparsity, 1.44 TB, 62 TB/s)",
        ),
        _device("l40s", 48, 362, 91.6, 864, 32, "ethernet_100", "NVIDIA L40S data sheet (PCIe 4.0 x16)"),
        _device("a10", 24, 125, 31.2, 600, 32, "ethernet_100", "NVIDIA A10 data sheet (PCIe 4.0 x16)"),
        _device("l4", 24, 121, 30.3, 300, 32, "ethernet_100", "NVIDIA L4 data sheet (242 bf16 TFLOP/s with sparsity)"),
        _device("mi300x", 192, 1307.4, 163.4, 5300, 448, "infiniband_400", "AMD Instinct MI300X data sheet"),
    )
}

NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        Network("infiniband_400", 50 * GIGA, 0, "one 400 Gb/s NDR port per GPU, as in NVIDIA DGX H100's user guide"),
        Network("infiniband_200", 25 * GIGA, 0, "one 200 Gb/s HDR port per GPU, as in NVIDIA DGX A100's user guide"),
        Network("ethernet_400", 0, 50 * GIGA, "line rate of one 400 Gb/s port per node"),
        Network("ethernet_100", 0, 12.5 * GIGA, "line rate of one 100 Gb/s port per node"),
        Network("ethernet_25", 0, 3.125 * GIGA, "line rate of one 25 Gb/s port per node"),
        Network("ethernet_10", 0, 1.25 * GIGA, "line rate of one 10 Gb/s port per node"),
    )
}


def find_device(name: str) -> Device:
    """The device of that name; `cpu` is measured.

    Raises:
        PlanError: it is not in the table.
    """
    if name == "cpu":
        return measure_cpu()
    if name in DEVICES:
        return DEVICES[name]
    near = near_name(name, DEVICES)
    raise PlanError(
        f"device {name!r} is not in the table",
        allowed=", ".join([*DEVICES, "cpu"]),
        action=f"did you mean {near!r}?" if near else "name one of them with --device or cluster.device_name",
    )


def find_network(name: str) -> Network:
    """The network of that name.

    Raises:
        PlanError: it is not in the table.
    """
    if name in NETWORKS:
        return NETWORKS[name]
    near = near_name(name, NETWORKS)
    raise PlanError(
        f"network {name!r} is not in the table",
        allowed=", ".join(NETWORKS),
        action=f"did you mean {near!r}?" if near else "name one of them with --network",
    )


def measure_cpu(seconds: float = 0.3) -> Device:
    """This machine, one core a rank: its memory divided by its cores, and matrix products and copies as timed now."""
    import torch

    cores = max(len(os.sched_getaffinity(0)), 1)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // cores
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        size = 512
        a, b = torch.randn(size, size), torch.randn(size, size)
        flops = _rate(lambda: torch.mm(a, b), 2.0 * size**3, seconds)
        source, target = torch.ones(2**23), torch.empty(2**23)
        copies = _rate(lambda: target.copy_(source), 2.0 * source.numel() * 4, seconds)
    finally:
        torch.set_num_threads(before)
    return Device("cpu", memory, flops, flops, copies, copies / 2, "ethernet_10", "timed on this machine, one core")


def _rate(work: object, amount: float, seconds: float) -> float:
    """Amount per second of the fastest call within `seconds`; the first call warms up."""
    assert callable(work)
    work()
    fastest, stop = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < stop:
        start = time.perf_counter()
        work()
        fastest = min(fastest, time.perf_counter() - start)
    return amount / fastest
