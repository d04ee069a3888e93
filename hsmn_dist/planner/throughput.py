"""Seconds per optimizer step, tokens per second, MFU, from FLOPs, link rates and two stated assumptions.

Unusual: MFU counts the model's FLOPs once (recomputed blocks do not raise it), and every guess is a named constant here.
Source of the term MFU: Chowdhery et al. 2022, arXiv 2204.02311, appendix B.
"""

from __future__ import annotations

from dataclasses import dataclass

from hsmn_dist.planner.communication import Traffic, bus_bytes_per_second, communication_seconds
from hsmn_dist.planner.flops import ForwardFlops
from hsmn_dist.planner.hardware import Device, Network
from hsmn_dist.planner.memory import Layout
from hsmn_dist.planner.parameters import ParameterCount

COMPUTE_EFFICIENCY = 0.45
"""Assumption: share of the peak rate while computing; 0.38 to 0.43 MFU in all is reported for bf16 on H100 (arXiv 2407.21783,
table 4). `--efficiency` changes it."""
OVERLAP_SHARE = 0.6
"""Assumption: share of the compute time that can hide communication under ZeRO 2 and 3 on GPUs (their backward passes)."""
STEP_BYTES_PER_ELEMENT = 48
"""Bytes that an Adam step with EWC moves for each element of a shard: value, gradient, m, v, A, mu read; value, m, v written;
norm, clipping and the copy for the next forward pass."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step.

    Attributes:
        compute: forward, backward and recomputation.
        optimizer: the update of this rank's shard.
        communication: all collectives, were nothing to hide them.
        exposed: the part of them that is not hidden behind computation.
    """

    compute: float
    optimizer: float
    communication: float
    exposed: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.compute + self.optimizer + self.exposed


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
    sent: Traffic,
    machines: Machines,
    micro_batches: int,
) -> StepTime:
    """Seconds of one optimizer step of `micro_batches` micro-batches per rank."""
    examples = micro_batches * layout.micro_batch_examples
    rate = machines.peak_flops(layout.element) * machines.efficiency
    compute = flops.training(layout.activation_checkpointing) * examples / rate
    share = parameters.total if layout.zero_stage == 0 else parameters.total / layout.world_size
    optimizer = share * STEP_BYTES_PER_ELEMENT / machines.device.memory_bytes_per_second
    bus = bus_bytes_per_second(machines.device, machines.network, machines.num_nodes, machines.gpus_per_node)
    communication = communication_seconds(sent, layout.world_size, bus)
    hidden = OVERLAP_SHARE * compute if layout.is_gpu and layout.zero_stage >= 2 else 0.0
    return StepTime(compute, optimizer, communication, max(0.0, communication - hidden))


def model_flops_utilization(
    flops: ForwardFlops, seconds: float, examples: int, machines: Machines, element: int
) -> float:
    """MFU of a step that trains on `examples` in `seconds` on all ranks."""
    return 3 * flops.total * examples / (seconds * machines.world_size * machines.peak_flops(element))
