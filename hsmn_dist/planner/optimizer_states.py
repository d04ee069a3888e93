"""State and work of every update rule: what a rank holds for it, how many FLOPs it takes, and what owners of matrices send.

Unusual: read off our optimizers one by one; tests count the real states, and the real FLOPs with torch's counter. Under ZeRO 1 to 3
a hidden matrix has one owner, who holds a whole fp32 copy and all of its state, so a rank's share stops falling at the largest
matrix. Dealing is that of `distributed/matrix_owner.py` (a test compares). ZeRO 3 cuts its flat tensors at 1e9 elements and deals
each alone; here they are dealt together. Source: Liu et al. 2025, arXiv 2502.16982, section 3.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from hsmn_dist.config.optim import AdamConfig, DeepMomentumConfig, M3Config, MuonConfig
from hsmn_dist.planner.parameters import ParameterCount

FP32 = 4
ADAM_STATES = 2
MATRIX_TEMPORARIES = 4
"""Most short-lived tensors of a matrix's size beside its gradient: Newton-Schulz has four, the delta rule as many."""

Settings = AdamConfig | MuonConfig | M3Config | DeepMomentumConfig


@dataclass(frozen=True)
class OptimizerLoad:
    """What the update rule costs; counters of one number (steps) are left out.

    Attributes:
        state_bytes: state of the whole model, once.
        rank_bytes: on the rank with the most of it: its part of the elementwise state, and the matrices that it owns.
        matrix_elements: elements that a matrix rule updates, in the whole model; 0 under Adam.
        owned_elements: those of the owner with the most (all of them where every rank steps everything).
        flops: matrix products of a step on the busiest rank (elementwise work is in the bytes that a step moves).
        flops_element: bytes of a number in those products.
        has_owners: whether matrices live whole on one rank each.
    """

    state_bytes: float
    rank_bytes: float
    matrix_elements: int
    owned_elements: int
    flops: float
    flops_element: int
    has_owners: bool

    def exchanged_bytes(self, world_size: int) -> float:
        """Bytes that the busiest rank hands to all-to-all exchanges in a step: gradients and values out, new values back."""
        if not self.has_owners or world_size == 1:
            return 0.0
        return FP32 * float(2 * -(-self.matrix_elements // world_size) + self.owned_elements)

    def step_bytes(self, elementwise_share: int, matrix_share: int, temporaries: int, world_size: int) -> float:
        """Short-lived bytes of the step beside the flat copy of the gradients, under ZeRO 1 to 3."""
        elementwise = FP32 * float(temporaries * elementwise_share)
        if not self.has_owners:
            return elementwise
        owned = (
            self.owned_elements
        )  # gradients and values of them are whole while the rule runs and until all is sent back
        if world_size == 1:
            return max(elementwise, FP32 * float(3 * owned))
        gathering = 2 * owned + matrix_share + max(matrix_share, owned)
        scattering = 4 * owned + matrix_share
        return max(elementwise, FP32 * float(max(gathering, scattering)))


def matrix_states(settings: Settings) -> int:
    """State tensors of a matrix's shape; Adam's where there is no matrix rule."""
    if isinstance(settings, MuonConfig):
        return 1
    if isinstance(settings, M3Config):
        return 5 if settings.mode == "paper" else 4
    if isinstance(settings, DeepMomentumConfig):
        return 1 if settings.variant != "dmgd" and settings.preconditioner == "identity" else 2
    return ADAM_STATES


def matrix_flops(settings: Settings, shape: tuple[int, int]) -> float:
    """FLOPs of the products in one update of a matrix, the mean over steps, as torch's counter counts."""
    rows, columns = shape
    small, large = sorted(shape)
    if isinstance(settings, MuonConfig | M3Config):
        newton_schulz = settings.num_newton_schulz_steps * (4.0 * small**2 * large + 2.0 * small**3)
        return newton_schulz * (1 + 1 / settings.slow_every_steps if isinstance(settings, M3Config) else 1)
    if isinstance(settings, DeepMomentumConfig):
        if settings.variant == "dmgd":
            return 12.0 * small**2 * large
        return 4.0 * rows**2 * columns if settings.variant == "delta" else 0.0
    return 0.0


def optimizer_load(settings: Settings, parameters: ParameterCount, world_size: int, is_sharded: bool) -> OptimizerLoad:
    """What the rule costs on `world_size` ranks; `is_sharded` under ZeRO 1 to 3."""
    is_adam = isinstance(settings, AdamConfig)
    matrices = () if is_adam else parameters.matrices
    matrix_elements = sum(rows * columns for rows, columns in matrices)
    states = matrix_states(settings)
    elementwise = ADAM_STATES * (parameters.total - matrix_elements) + (parameters.periodic if is_adam else 0)
    state_bytes = FP32 * float(elementwise + states * matrix_elements)
    works = [matrix_flops(settings, shape) for shape in matrices]
    element = 2 if isinstance(settings, MuonConfig) else FP32  # torch's Muon orthogonalises in bf16
    if not is_sharded:
        return OptimizerLoad(state_bytes, state_bytes, matrix_elements, matrix_elements, sum(works), element, False)
    owned, flops = [0] * world_size, [0.0] * world_size
    for shape, work, owner in zip(matrices, works, deal_matrices(matrices, world_size), strict=True):
        owned[owner] += shape[0] * shape[1]
        flops[owner] += work
    whole = FP32 * float((1 + states) * max(owned))
    rank_bytes = FP32 * float(-(-elementwise // world_size)) + whole
    return OptimizerLoad(
        state_bytes, rank_bytes, matrix_elements, max(owned), max(flops), element, has_owners=bool(matrices)
    )


def deal_matrices(shapes: Sequence[tuple[int, int]], world_size: int) -> list[int]:
    """Owner of each matrix: the most costly first, each to the rank with the least so far, ties to the lower rank."""
    costs = [float(rows) * float(columns) * float(min(rows, columns)) for rows, columns in shapes]
    loads = [(0.0, rank) for rank in range(world_size)]
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, owners[index] = heapq.heappop(loads)
        heapq.heappush(loads, (load + costs[index], owners[index]))
    return owners
