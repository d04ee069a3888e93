"""Magnitude pruning as pure functions: how sparse at which optimizer step, and which weights of a matrix go.

Unusual: the number of zeros is exact (ties fall by position), steps are optimizer steps, and the 2:4 structure follows the
same schedule by pruning the cheapest groups of four first. Training applies the masks to its fp32 shards after each step.
Source: Zhu and Gupta 2017, arXiv 1710.01878, equation 1; 2:4: Mishra et al. 2021, arXiv 2104.08378.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from hsmn_dist.config.models import PruningConfig
from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.models.contract import LanguageModel

Structure = Literal["unstructured", "2:4"]
GROUP = 4
KEPT_OF_GROUP = 2
SPARSE_SIZE_STEP = 64


def sparsity_at_step(config: PruningConfig, step: int) -> float:
    """Share of zeros that the schedule asks for after optimizer step `step` (0-based)."""
    if config.schedule == "none" or step < config.begin_step:
        return 0.0
    if config.schedule == "constant" or step >= config.end_step:
        return config.sparsity
    progress = (step - config.begin_step) / (config.end_step - config.begin_step)
    return config.sparsity * (1.0 - (1.0 - progress) ** 3)


def is_mask_step(config: PruningConfig, step: int) -> bool:
    """True when masks are computed anew after optimizer step `step` (0-based); in between the last ones hold."""
    if config.schedule == "none" or step < config.begin_step:
        return False
    is_ramp_end = config.schedule == "gradual" and step == config.end_step
    return is_ramp_end or (step - config.begin_step) % config.every_steps == 0


def mask_step(config: PruningConfig, step: int) -> int | None:
    """The last step up to `step` at which masks were computed; None before the first."""
    if config.schedule == "none" or step < config.begin_step:
        return None
    last = step - (step - config.begin_step) % config.every_steps
    if config.schedule == "gradual" and last < config.end_step <= step:
        return config.end_step
    return last


def compute_mask(weight: Tensor, sparsity: float, structure: Structure = "unstructured") -> Tensor:
    """Which weights stay.

    Args:
        weight: [out, in].
        sparsity: share of zeros, 0 to 1; "2:4" takes at most one half.
        structure: "unstructured": the smallest magnitudes of the whole matrix go, exactly round(sparsity * elements) of
            them; "2:4": two of every four neighbours in a row go, in round(2 * sparsity * groups) groups, the ones that
            lose least first. Columns behind the last full group of four stay.

    Returns:
        Bool, shape of `weight`, True where the weight stays.
    """
    if not 0.0 <= sparsity <= 1.0:
        raise ModelError(f"a sparsity of {sparsity}", allowed="0 to 1", action="change model.pruning.sparsity")
    if structure == "2:4":
        return _two_four_mask(weight, min(sparsity, 0.5))
    flat = weight.detach().abs().flatten()
    num_zeros = round(sparsity * flat.numel())
    mask = torch.ones_like(flat, dtype=torch.bool)
    mask[flat.argsort(stable=True)[:num_zeros]] = False
    return mask.view_as(weight)


def _two_four_mask(weight: Tensor, sparsity: float) -> Tensor:
    num_rows, num_columns = weight.shape
    groups_per_row = num_columns // GROUP
    mask = torch.ones_like(weight, dtype=torch.bool)
    if groups_per_row == 0:
        return mask
    size = weight[:, : groups_per_row * GROUP].detach().abs().reshape(-1, GROUP)  # [G, 4]
    order = size.argsort(dim=1, stable=True)
    dropped = order[:, : GROUP - KEPT_OF_GROUP]
    loss = size.gather(1, dropped).square().sum(dim=1)
    num_pruned = round(sparsity * GROUP / (GROUP - KEPT_OF_GROUP) * loss.numel())
    is_pruned = torch.zeros_like(loss, dtype=torch.bool)
    is_pruned[loss.argsort(stable=True)[:num_pruned]] = True
    group_mask = torch.ones_like(size, dtype=torch.bool).scatter(1, dropped, ~is_pruned[:, None].expand_as(dropped))
    mask[:, : groups_per_row * GROUP] = group_mask.view(num_rows, groups_per_row * GROUP)
    return mask


def expected_zeros(shape: tuple[int, ...], sparsity: float, structure: Structure = "unstructured") -> int:
    """Zeros that `compute_mask` makes in a weight of this shape."""
    if structure == "unstructured":
        return round(sparsity * math.prod(shape))
    num_groups = shape[0] * (shape[1] // GROUP)
    dropped = GROUP - KEPT_OF_GROUP
    return dropped * round(min(sparsity, 0.5) * GROUP / dropped * num_groups)


def compute_masks(
    weights: Mapping[str, Tensor], names: Iterable[str], config: PruningConfig, step: int
) -> dict[str, Tensor]:
    """Masks of the named matrices after optimizer step `step`."""
    sparsity = sparsity_at_step(config, step)
    return {name: compute_mask(weights[name], sparsity, config.structure) for name in names}


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Write the zeros into the weights, in place."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].mul_(mask.to(parameters[name].dtype))


def measured_sparsity(weights: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, float]:
    """Share of exact zeros of each named weight."""
    return {name: float((weights[name] == 0).double().mean()) for name in names}


def is_two_four(weight: Tensor) -> bool:
    """True when every full group of four neighbours in a row holds at least two zeros."""
    columns = weight.shape[1] // GROUP * GROUP
    zeros = (weight[:, :columns] == 0).reshape(-1, GROUP).sum(dim=1)
    return bool((zeros >= GROUP - KEPT_OF_GROUP).all())


def move_to_sparse_kernels(model: LanguageModel) -> list[str]:
    """Move a model to the GPU in bf16 and its 2:4 matrices onto the sparse tensor cores; see `use_sparse_kernels`."""
    if torch.cuda.is_available():
        model.to("cuda", torch.bfloat16)
    return use_sparse_kernels(model)


def use_sparse_kernels(model: LanguageModel) -> list[str]:
    """Turn the prunable 2:4 matrices of a model in half precision on a GPU into semi-structured sparse tensors.

    For inference only (the weights become constants). Returns the names converted; matrices whose sizes the kernels do not
    take stay dense.

    Raises:
        ModelError: a model that is not on a GPU in half precision, or without any matrix that the kernels take.
    """
    names = model.prunable_parameters()
    found = {name: model.get_parameter(name) for name in names}
    dense = next((p for p in found.values() if not p.is_cuda or p.dtype not in (torch.float16, torch.bfloat16)), None)
    if dense is not None:
        raise ModelError(
            f"sparse kernels for weights of {dense.dtype} on {dense.device.type}",
            allowed="float16 or bfloat16 on a GPU with sparse tensor cores (Ampere or newer)",
            action="move the model there first, or go on without sparse kernels",
        )
    converted = [name for name, weight in found.items() if takes_sparse_kernels(weight)]
    if not converted:
        raise ModelError(
            f"sparse kernels for a model with {len(names)} prunable matrices, none of which they take",
            allowed=f"matrices in the 2:4 structure whose sizes are multiples of {SPARSE_SIZE_STEP}",
            action="train with model.pruning.structure 2:4, or go on without sparse kernels",
        )
    for name in converted:
        path, leaf = name.rsplit(".", 1)
        sparse = torch.sparse.to_sparse_semi_structured(found[name].detach())
        setattr(model.get_submodule(path), leaf, nn.Parameter(sparse, requires_grad=False))
    return converted


def takes_sparse_kernels(weight: Tensor) -> bool:
    """True for a 2:4 matrix of sizes that the sparse tensor cores' kernels take."""
    return is_two_four(weight) and all(size % SPARSE_SIZE_STEP == 0 for size in weight.shape)
