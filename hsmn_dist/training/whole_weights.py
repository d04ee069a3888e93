"""Whole weights from shards, and shards from whole weights, by parameter name; the same for every engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hsmn_dist.distributed.collectives import sum_of_pieces
from hsmn_dist.distributed.shards import ParamShard
from hsmn_dist.foundation.errors import CheckpointError


def gather_weights(shards: Sequence[ParamShard], num_copies: int) -> dict[str, Tensor]:
    """Every parameter whole, fp32, on the CPU of every rank. Collective; one parameter at a time is on the device.

    Args:
        shards: this rank's shards, the same parameters in the same order on all ranks.
        num_copies: above 1 the shards are whole already and nothing is exchanged.
    """
    weights: dict[str, Tensor] = {}
    for shard in shards:
        if num_copies > 1:
            whole = shard.value.detach().float()
        else:
            num_elements = torch.Size(shard.shape).numel()
            whole = torch.zeros(num_elements, dtype=torch.float32, device=shard.value.device)
            whole[shard.start : shard.stop] = shard.value.detach()
            sum_of_pieces(whole)
        weights[shard.name] = whole.to("cpu", copy=True).view(shard.shape)
    return weights


def scatter_weights(shards: Sequence[ParamShard], weights: Mapping[str, Any], frozen: Mapping[str, Tensor]) -> None:
    """Copy each rank's ranges out of whole weights; `frozen` parameters are set whole.

    Raises:
        CheckpointError: names or shapes differ from the model's.
    """
    shapes = {shard.name: tuple(shard.shape) for shard in shards} | {k: tuple(v.shape) for k, v in frozen.items()}
    missing, unknown = sorted(set(shapes) - set(weights)), sorted(set(weights) - set(shapes))
    different = [
        f"{name} {list(weights[name].shape)} against {list(shape)}"
        for name, shape in shapes.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    if missing or unknown or different:
        raise CheckpointError(
            f"weights that do not fit the model: missing {missing[:5]}, unknown {unknown[:5]}, shapes {different[:5]}",
            allowed="exactly the model's parameter names and shapes",
            action="use weights of this model and configuration",
        )
    with torch.no_grad():
        for shard in shards:
            whole = weights[shard.name].reshape(-1)
            shard.value.copy_(whole[shard.start : shard.stop])
        for name, parameter in frozen.items():
            parameter.data.copy_(weights[name])
