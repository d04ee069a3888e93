"""Global gradient norm, in all and by component, from the shards of every rank, and the step's loss with it.

Unusual: both engines clip by this one number, computed after penalties were added to the shards, so what is clipped is the
whole gradient on every ZeRO stage, with offload too (DeepSpeed takes its own norms there before penalties can be seen).
Clipping needs the norm on the host, so a step waits for the device once; everything else that is judged every step (the loss) comes
with it, in one all-reduce and one transfer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hsmn_dist.distributed.collectives import all_reduce_sum
from hsmn_dist.distributed.shards import ParamShard

CLIP_EPSILON = 1e-6
"""Added to the norm before dividing, as torch and DeepSpeed do."""


@dataclass(frozen=True)
class GradientNorms:
    """L2 norms before clipping, NaN or infinite when a gradient is; and the sum over ranks of what was given as `nll`."""

    total: float
    by_component: dict[str, float]
    nll: float = 0.0

    @property
    def is_finite(self) -> bool:
        """False when any gradient of any rank is infinite or NaN."""
        return math.isfinite(self.total)

    def clip_factor(self, max_norm: float) -> float:
        """What to multiply gradients by; 1.0 when they are short enough or `max_norm` is 0 (clipping off)."""
        if max_norm == 0 or not self.is_finite:
            return 1.0
        return min(1.0, max_norm / (self.total + CLIP_EPSILON))


def gradient_norms(
    shards: Sequence[ParamShard], components: Sequence[str], num_copies: int, nll: Tensor | None = None
) -> GradientNorms:
    """Collective. `num_copies` is how many ranks hold the same shards (1 unless nothing is sharded).

    Args:
        shards: this rank's shards with gradients.
        components: every component of the model, the same list on all ranks.
        num_copies: `Engine.num_shard_copies`.
        nll: a scalar of this rank to be summed over all ranks.
    """
    places = {name: index for index, name in enumerate(components)}
    present = [shard for shard in shards if shard.gradient is not None and shard.num_elements]
    device = present[0].value.device if present else torch.device("cpu")
    if present and present[0].gradient is not None:
        device = present[0].gradient.device
    sums = torch.zeros(len(components) + 1, dtype=torch.float32, device=device)
    if nll is not None:
        sums[-1] = nll
    if present:
        norms = [torch.linalg.vector_norm(s.gradient, dtype=torch.float32) for s in present if s.gradient is not None]
        index = torch.tensor([places[shard.component] for shard in present], device=device)
        sums.index_add_(0, index, torch.stack(norms).square())
    *values, nll_sum = all_reduce_sum(sums).tolist()
    values = [value / num_copies for value in values]
    by_component = {
        name: math.sqrt(value) if value == value else math.nan for name, value in zip(components, values, strict=True)
    }
    return GradientNorms(math.sqrt(sum(values)) if sum(values) == sum(values) else math.nan, by_component, nll_sum)
