"""Bytes of every collective in one optimizer step, when they run, and the seconds they take on given links.

Unusual: the volumes are what DeepSpeed 0.19 sends, counted by wrapping torch.distributed (a test counts again): stage 2 reduces
every micro-batch by all-reduce, and stage 3 gathers a parameter once per micro-batch while no more than 1e9 elements are alive.
What runs beside the backward pass is kept apart from what the step waits for: weights gathered in `step()`, stage 1's reduction,
which starts when the backward pass is over, and the last bucket of every reduction.
Seconds: a ring moves 2 (n - 1) / n of a buffer for an all-reduce and (n - 1) / n for a gather or scatter, over the slower of the
links inside a node and a node's links to the network. Source: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hsmn_dist.planner.hardware import Device, Network
from hsmn_dist.planner.memory import Layout
from hsmn_dist.planner.parameters import ParameterCount

LINK_EFFICIENCY = 0.8
"""Assumption: share of a link's rate that large collectives reach."""
CALL_SECONDS = 20e-6
"""Assumption: start of a collective, with the Python around it."""
RING_STEP_SECONDS = 3.4e-6
RING_NETWORK_STEP_SECONDS = 9.6e-6
TREE_STEP_SECONDS = 28e-6
TREE_NETWORK_STEP_SECONDS = 50e-6
"""Assumptions: one step of a ring or tree, inside a node and between nodes: what NCCL itself reckons with for its Simple protocol
over NVLink and a network (`hwLat` in NCCL's src/graph/tuning.cc, whose formulas for the number of steps are used too)."""
STEP_GATHERS = 2
"""All-gathers of new weights in a step of stage 1 or 2, one for each parameter group: decayed or not."""
GATHERED_ELEMENTS = 50_000_000
"""DeepSpeed's stage3_prefetch_bucket_size: elements that stage 3 gathers together."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that enter each kind of collective on one rank in one optimizer step (the buffer, not the wire).

    Attributes:
        all_reduce, reduce_scatter, all_gather, all_to_all: bytes.
        num_all_reduces: calls of all-reduce, which may be trees.
        num_rings: calls of the others, which pass every rank.
    """

    all_reduce: float = 0.0
    reduce_scatter: float = 0.0
    all_gather: float = 0.0
    num_all_reduces: int = 0
    num_rings: int = 0
    all_to_all: float = 0.0

    @property
    def total(self) -> float:
        """All buffers together."""
        return self.all_reduce + self.reduce_scatter + self.all_gather + self.all_to_all

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.all_reduce + other.all_reduce,
            self.reduce_scatter + other.reduce_scatter,
            self.all_gather + other.all_gather,
            self.num_all_reduces + other.num_all_reduces,
            self.num_rings + other.num_rings,
            self.all_to_all + other.all_to_all,
        )

    def wire_bytes(self, world_size: int) -> float:
        """Bytes that a rank sends in one step when every collective but all-to-all is a ring."""
        share = (world_size - 1) / world_size
        return share * (2 * self.all_reduce + self.reduce_scatter + self.all_gather)


@dataclass(frozen=True)
class StepTraffic:
    """One optimizer step's traffic by when it runs.

    Attributes:
        beside: beside the backward pass, where streams overlap (on GPUs under ZeRO 2 and 3).
        waiting: while nothing else runs.
    """

    beside: Traffic
    waiting: Traffic

    @property
    def all(self) -> Traffic:
        """Both."""
        return self.beside + self.waiting


def traffic(parameters: ParameterCount, layout: Layout, num_micro_batches: int) -> Traffic:
    """Buffers of gradients and weights; the scalars of norms and flags (some tens of bytes) are left out."""
    return step_traffic(parameters, layout, num_micro_batches).all


def step_traffic(
    parameters: ParameterCount, layout: Layout, num_micro_batches: int, exchanged: float = 0.0
) -> StepTraffic:
    """Gradients and weights of one step, and `exchanged` bytes that owners of matrices send and receive in it."""
    if layout.world_size == 1:
        return StepTraffic(Traffic(), Traffic())
    size = float(layout.element * parameters.total)
    buckets = reduction_buckets(parameters, layout)
    owners = Traffic(all_to_all=exchanged, num_rings=3 if exchanged else 0)
    if layout.zero_stage == 0:
        return StepTraffic(Traffic(), Traffic(all_reduce=size, num_all_reduces=len(buckets)))
    if layout.zero_stage == 1:
        reduced = Traffic(all_reduce=size, num_all_reduces=len(buckets))
        return StepTraffic(Traffic(), reduced + Traffic(all_gather=size, num_rings=STEP_GATHERS) + owners)
    # A bucket goes when the next gradient does not fit any more; nothing is left to hide the last one behind.
    last = buckets[-1] / parameters.total
    early = num_micro_batches * (len(buckets) - 1)
    if layout.zero_stage == 2:
        reduced_bytes = size * num_micro_batches
        beside = Traffic(all_reduce=(1 - last) * reduced_bytes, num_all_reduces=early)
        behind = Traffic(all_reduce=last * reduced_bytes, num_all_reduces=num_micro_batches)
        return StepTraffic(beside, behind + Traffic(all_gather=size, num_rings=STEP_GATHERS) + owners)
    ranks = layout.world_size
    scattered = float(layout.element * parameters.padded(ranks)) * num_micro_batches
    small = [size for size in parameters.sizes if size <= layout.persistent_elements]
    kept = sum(-(-size // ranks) * ranks for size in small)
    again = max(0, parameters.total - sum(small) - layout.live_elements)
    gathered = parameters.padded(ranks) - kept + again
    fetches = num_micro_batches * -(-gathered // GATHERED_ELEMENTS)
    beside = Traffic(
        reduce_scatter=(1 - last) * scattered,
        all_gather=float(layout.element * gathered * num_micro_batches),
        num_rings=early + fetches,
    )
    behind = Traffic(reduce_scatter=last * scattered, num_rings=num_micro_batches)
    kept_whole = Traffic(all_gather=float(layout.element * kept), num_rings=1 if kept else 0)
    return StepTraffic(beside, behind + kept_whole + owners)


def reduction_buckets(parameters: ParameterCount, layout: Layout) -> list[int]:
    """Elements of each bucket of gradients, as a backward pass fills them: the last parameter first; one that is too large is alone."""
    buckets: list[int] = []
    for size in reversed(parameters.sizes):
        if buckets and buckets[-1] + size <= layout.bucket_elements:
            buckets[-1] += size
        else:
            buckets.append(size)
    return buckets


def context_traffic(num_rows: int, d_compressed: int, layout: Layout, num_micro_batches: int) -> Traffic:
    """Buffers of the exchange of compressed chunks, `num_rows` chunks a micro-batch, in every one of its passes."""
    size = layout.context_parallel
    if size == 1:
        return Traffic()
    padded = float(-(-num_rows // size) * size * d_compressed * layout.element * num_micro_batches)
    return Traffic(reduce_scatter=padded, all_gather=padded, num_rings=2 * num_micro_batches)


def bus_bytes_per_second(device: Device, network: Network, num_nodes: int, gpus_per_node: int) -> float:
    """Rate at which a ring over all ranks moves a buffer."""
    rates = []
    if gpus_per_node > 1:
        rates.append(device.link_bytes_per_second)
    if num_nodes > 1:
        rates.append(network.node_bytes_per_second(gpus_per_node))
    return min(rates) * LINK_EFFICIENCY if rates else math.inf


def ring_latency(world_size: int, num_nodes: int) -> float:
    """Seconds of one turn of a ring over all ranks with nothing to carry: a step a rank, those between nodes the longest."""
    return (world_size - num_nodes) * RING_STEP_SECONDS + (num_nodes - 1) * RING_NETWORK_STEP_SECONDS


def all_reduce_latency(world_size: int, num_nodes: int) -> float:
    """Seconds of an all-reduce with nothing to carry: two turns of a ring, or up and down a tree over nodes where that is less."""
    inside = (world_size // num_nodes - 1) * TREE_STEP_SECONDS
    tree = 2 * (inside + math.ceil(math.log2(num_nodes)) * TREE_NETWORK_STEP_SECONDS)
    return min(2 * ring_latency(world_size, num_nodes), tree)


def communication_seconds(traffic: Traffic, world_size: int, bus: float, num_nodes: int = 1) -> float:
    """Seconds of one optimizer step's collectives when nothing hides them."""
    if world_size == 1:
        return 0.0
    seconds = traffic.wire_bytes(world_size) / bus
    # Pieces for single ranks do not pass along: what leaves a node goes over this rank's part of its links.
    own = bus * num_nodes / world_size if num_nodes > 1 else bus
    seconds += traffic.all_to_all * (world_size - 1) / world_size / own
    seconds += traffic.num_all_reduces * (CALL_SECONDS + all_reduce_latency(world_size, num_nodes))
    return seconds + traffic.num_rings * (CALL_SECONDS + ring_latency(world_size, num_nodes))
