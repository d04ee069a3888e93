"""Seconds per optimizer step, tokens per second, MFU, from FLOPs, link rates and stated assumptions.

Unusual: each micro-batch pays for the kernels that it launches, so few large ones are faster than many small ones. MFU counts the model's FLOPs once (recomputed blocks do not raise it), and every guess is a named constant here.
Source of the term MFU: Chowdhery et al. 2022, arXiv 2204.02311, appendix B.
"""

from __future__ import annotations

from dataclasses import dataclass

from hsmn_dist.config.models import HopeConfig, HsmnHopeConfig, ModelConfig
from hsmn_dist.planner.communication import StepTraffic, bus_bytes_per_second, communication_seconds
from hsmn_dist.planner.flops import ForwardFlops
from hsmn_dist.planner.hardware import Device, Network
from hsmn_dist.planner.memory import Layout
from hsmn_dist.planner.optimizer_states import OptimizerLoad
from hsmn_dist.planner.parameters import ParameterCount

COMPUTE_EFFICIENCY = 0.45
"""Assumption: share of the peak rate while computing; 0.38 to 0.43 MFU in all is reported for bf16 on H100 (arXiv 2407.21783,
table 4). `--efficiency` changes it."""
OVERLAP_SHARE = 0.6
"""Assumption: share of the compute time, that of the backward pass, that can hide communication under ZeRO 2 and 3 on GPUs."""
KERNEL_SECONDS = 2e-6
"""Assumption: what a kernel costs beside its work: about 1 us between kernels that are launched ahead (2.9 us of work took 3.8 us in
Gray 2019, "Getting Started with CUDA Graphs", NVIDIA technical blog), as much again while it fills and empties the device."""
KERNELS_PER_BLOCK = 100
KERNELS_PER_MEMORY = 200
"""Operations of a block's forward and backward pass, and of a continuum memory in it, within a factor of two of what torch is told
to do (a test counts). Self-modifying mixers and chain memories work through a row in a loop and launch more; it is not counted."""
STEP_BYTES_PER_ELEMENT = 32
"""Bytes that a step with EWC moves for each element of a shard, states left out: value, gradient, A, mu read; value written; norm,
clipping and the copy for the next forward pass. Each byte of state is read and written besides."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step.

    Attributes:
        compute: forward, backward and recomputation.
        launches: what the micro-batches' kernels cost beside their work.
        optimizer: the update of this rank's shard, and of the matrices that it owns.
        communication: all collectives, were nothing to hide them.
        exposed: the part of them that is not hidden behind computation.
    """

    compute: float
    launches: float
    optimizer: float
    communication: float
    exposed: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.compute + self.launches + self.optimizer + self.exposed


@dataclass(frozen=True)
class Machines:
    """What the ranks run on."""

    device: Device
    network: Network
    num_nodes: int
    gpus_per_node: int
    efficiency: float = COMPUTE_EFFICIENCY

    @property
    def world_size(self) -> int:
        """Ranks, one per GPU."""
        return self.num_nodes * self.gpus_per_node

    def peak_flops(self, element: int) -> float:
        """FLOP/s of one device for weights of `element` bytes."""
        return self.device.bf16_flops if element == 2 else self.device.fp32_flops


def step_time(
    flops: ForwardFlops,
    parameters: ParameterCount,
    layout: Layout,
    sent: StepTraffic,
    machines: Machines,
    micro_batches: int,
    load: OptimizerLoad,
    kernels: float,
) -> StepTime:
    """Seconds of one optimizer step of `micro_batches` micro-batches per rank, each of which launches `kernels`."""
    examples = micro_batches * layout.micro_batch_examples
    rate = machines.peak_flops(layout.element) * machines.efficiency
    compute = flops.training(layout.activation_checkpointing) * examples / rate
    share = parameters.total / (layout.world_size if layout.is_sharded else 1)
    moved = share * STEP_BYTES_PER_ELEMENT + 2 * load.rank_bytes
    optimizer = moved / machines.device.memory_bytes_per_second
    optimizer += load.flops / (machines.peak_flops(load.flops_element) * machines.efficiency)
    bus = bus_bytes_per_second(machines.device, machines.network, machines.num_nodes, machines.gpus_per_node)
    beside, waiting = (
        communication_seconds(part, layout.world_size, bus, machines.num_nodes) for part in (sent.beside, sent.waiting)
    )
    hidden = OVERLAP_SHARE * compute if layout.is_gpu else 0.0
    exposed = waiting + max(0.0, beside - hidden)
    return StepTime(compute, micro_batches * kernels * KERNEL_SECONDS, optimizer, beside + waiting, exposed)


def kernels_per_micro_batch(config: ModelConfig, num_blocks: int, activation_checkpointing: str) -> float:
    """Kernels that one micro-batch launches; recomputing adds a third, that of the forward pass."""
    memories = 0
    if isinstance(config, HsmnHopeConfig):
        memories = config.num_decoder_layers
    elif isinstance(config, HopeConfig) and config.uses_cms:
        memories = config.num_layers
    recomputed = {"none": 0.0, "every_second_block": 1 / 6, "every_block": 1 / 3}[activation_checkpointing]
    return (KERNELS_PER_BLOCK * num_blocks + KERNELS_PER_MEMORY * memories) * (1 + recomputed)


def model_flops_utilization(
    flops: ForwardFlops, seconds: float, examples: int, machines: Machines, element: int
) -> float:
    """MFU of a step that trains on `examples` in `seconds` on all ranks."""
    return 3 * flops.total * examples / (seconds * machines.world_size * machines.peak_flops(element))
