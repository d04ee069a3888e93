"""Magnitude pruning in training: masks that hold weights at zero, on the fp32 shards after each optimizer step.

Unusual: a mask belongs to whole matrices (the smallest magnitudes of all of one), and shards are flat ranges, so on the few steps
that compute masks each prunable matrix is gathered, one at a time; every rank computes the same mask and keeps its own range.
Masks are not stored: while one holds, exactly the masked weights are 0 on the shards, so a resumed stage reads them off. Source:
`models.pruning` for the schedule and the masks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hsmn_dist.config.models import PruningConfig
from hsmn_dist.distributed.collectives import all_reduce_sum
from hsmn_dist.distributed.shards import ParamShard
from hsmn_dist.models.pruning import compute_mask, is_mask_step, mask_step, sparsity_at_step
from hsmn_dist.tracking import metric_names as names
from hsmn_dist.training.whole_weights import gather_weights


class PruningMask:
    """Satisfies `loop.WeightMask`. Collective on steps that compute masks."""

    def __init__(self, config: PruningConfig, prunable: Iterable[str], num_shard_copies: int = 1) -> None:
        """`prunable` are the names that `LanguageModel.prunable_parameters()` gives; the rest as in `Engine`."""
        self._config = config
        self._prunable = frozenset(prunable)
        self._num_copies = num_shard_copies
        self._masks: dict[str, Tensor] = {}
        self._sparsity = 0.0

    @torch.no_grad()
    def after_step(self, shards: Sequence[ParamShard], step: int) -> bool:
        """Apply the mask after optimizer step `step` (0-based); True when there is one."""
        own = [shard for shard in shards if shard.name in self._prunable]
        if is_mask_step(self._config, step):
            self._masks = self._compute(own, step)
            self._sparsity = self._measured(own)
        for shard in own:
            if shard.name in self._masks:
                shard.value.mul_(self._masks[shard.name])
        return bool(self._masks)

    def read(self, shards: Sequence[ParamShard], step: int) -> None:
        """Take the masks from the weights that a checkpoint of `step` steps brought back. Collective."""
        self._masks = {}
        if step == 0 or mask_step(self._config, step - 1) is None:
            return
        own = [shard for shard in shards if shard.name in self._prunable]
        self._masks = {shard.name: (shard.value != 0).to(shard.value.dtype) for shard in own}
        self._sparsity = self._measured(own)

    def metrics(self) -> dict[str, float]:
        """Share of prunable weights that are masked."""
        return {names.TRAIN_SPARSITY: self._sparsity}

    def _compute(self, own: Sequence[ParamShard], step: int) -> dict[str, Tensor]:
        sparsity = sparsity_at_step(self._config, step)
        masks = {}
        for shard in own:
            whole = gather_weights([shard], self._num_copies)[shard.name]
            mask = compute_mask(whole, sparsity, self._config.structure).view(-1)[shard.start : shard.stop]
            masks[shard.name] = mask.to(shard.value.device, shard.value.dtype)
        return masks

    def _measured(self, own: Sequence[ParamShard]) -> float:
        counts = torch.tensor(
            [
                sum(float((self._masks[shard.name] == 0).sum()) for shard in own),
                float(sum(shard.num_elements for shard in own)),
            ],
            dtype=torch.float64,
        )
        num_masked, num_all = all_reduce_sum(counts).tolist()
        return num_masked / max(num_all, 1.0)
