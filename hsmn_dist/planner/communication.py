"""Bytes of every collective in one optimizer step, and the seconds they take on given links.

Unusual: the volumes are what DeepSpeed 0.19 sends, counted by wrapping torch.distributed (a test counts again): stage 2 reduces
every micro-batch by all-reduce, and stage 3 gathers a parameter once per micro-batch while no more than 1e9 elements are alive.
Seconds: a ring moves 2 (n - 1) / n of a buffer for an all-reduce and (n - 1) / n for a gather or scatter, over the slower of the
links inside a node and a node's links to the network. Source: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hsmn_dist.planner.hardware import Device, Network
from hsmn_dist.planner.memory import BUCKET_ELEMENTS, MAX_LIVE_ELEMENTS, Layout
from hsmn_dist.planner.parameters import ParameterCount

LINK_EFFICIENCY = 0.8
"""Assumption: share of a link's rate that large collectives reach."""
CALL_SECONDS = 20e-6
"""Assumption: start of a collective and one step of its tree, per doubling of the ranks."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that enter each kind of collective on one rank in one optimizer step (the buffer, not the wire)."""

    all_reduce: float
    reduce_scatter: float
    all_gather: float
    num_calls: int

    @property
    def total(self) -> float:
        """All buffers together."""
        return self.all_reduce + self.reduce_scatter + self.all_gather

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.all_reduce + other.all_reduce,
            self.reduce_scatter + other.reduce_scatter,
            self.all_gather + other.all_gather,
            self.num_calls + other.num_calls,
        )

    def wire_bytes(self, world_size: int) -> float:
        """Bytes that a rank sends in one step when every collective is a ring."""
        share = (world_size - 1) / world_size
        return share * (2 * self.all_reduce + self.reduce_scatter + self.all_gather)


def traffic(parameters: ParameterCount, layout: Layout, num_micro_batches: int) -> Traffic:
    """Buffers of gradients and weights; the scalars of norms and flags (some tens of bytes) are left out."""
    if layout.world_size == 1:
        return Traffic(0.0, 0.0, 0.0, 0)
    size = layout.element * parameters.total
    buckets = -(-parameters.total // BUCKET_ELEMENTS)
    if layout.zero_stage == 0:
        return Traffic(size, 0.0, 0.0, buckets)
    if layout.zero_stage == 1:
        return Traffic(size, 0.0, size, 2 * buckets)
    if layout.zero_stage == 2:
        return Traffic(size * num_micro_batches, 0.0, size, buckets * (num_micro_batches + 1))
    padded = layout.element * parameters.padded(layout.world_size)
    small = [size for size in parameters.sizes if size <= layout.persistent_elements]
    ranks = layout.world_size
    kept = layout.element * sum(-(-size // ranks) * ranks for size in small)
    gathered = padded - kept
    again = max(0, parameters.total - sum(small) - MAX_LIVE_ELEMENTS) * layout.element
    calls = num_micro_batches * (buckets + 2 * max(parameters.num_blocks, 1))
    return Traffic(0.0, padded * num_micro_batches, (gathered + again) * num_micro_batches + kept, calls)


def context_traffic(num_rows: int, d_compressed: int, layout: Layout, num_micro_batches: int) -> Traffic:
    """Buffers of the exchange of compressed chunks, `num_rows` chunks a micro-batch, in every one of its passes."""
    size = layout.context_parallel
    if size == 1:
        return Traffic(0.0, 0.0, 0.0, 0)
    padded = float(-(-num_rows // size) * size * d_compressed * layout.element * num_micro_batches)
    return Traffic(0.0, padded, padded, 2 * num_micro_batches)


def bus_bytes_per_second(device: Device, network: Network, num_nodes: int, gpus_per_node: int) -> float:
    """Rate at which a ring over all ranks moves a buffer."""
    rates = []
    if gpus_per_node > 1:
        rates.append(device.link_bytes_per_second)
    if num_nodes > 1:
        rates.append(network.node_bytes_per_second(gpus_per_node))
    return min(rates) * LINK_EFFICIENCY if rates else math.inf


def communication_seconds(traffic: Traffic, world_size: int, bus: float) -> float:
    """Seconds of one optimizer step's collectives when nothing hides them."""
    if world_size == 1:
        return 0.0
    return traffic.wire_bytes(world_size) / bus + traffic.num_calls * CALL_SECONDS * math.log2(world_size)
