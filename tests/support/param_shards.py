"""Parameter shards without an engine: any flat ranges of any named tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hsmn_dist.distributed.shards import ParamShard, owned_range
from hsmn_dist.foundation.param_role import ParamRole


def shards_of(weights: Mapping[str, Tensor], rank: int = 0, world_size: int = 1, component=None) -> list[ParamShard]:
    """One rank's equal pieces of each tensor; values and gradients are views where the tensors are contiguous."""
    shards = []
    for name, weight in weights.items():
        flat = weight.detach().view(-1)
        start, stop = owned_range(flat.numel(), rank, world_size)
        gradient = weight.grad.view(-1)[start:stop] if weight.grad is not None else None
        part = component(name) if component else "decoder"
        shape = tuple(weight.shape)
        shards.append(ParamShard(name, ParamRole.MATRIX, part, shape, start, stop, flat[start:stop], gradient))
    return shards


def module_shards(module: nn.Module, rank: int = 0, world_size: int = 1) -> list[ParamShard]:
    """Shards of every parameter that is trained."""
    return shards_of({n: p for n, p in module.named_parameters() if p.requires_grad}, rank, world_size)


def random_weights(seed: int, shapes: Mapping[str, tuple[int, ...]], dtype=torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}
