"""How a module's weight gradient follows from its input and its output's gradient, module kind by module kind.

A rule turns (input, output gradient) into contributions: per-row factors from which the gradient of ANY subset of rows is
a cheap sum. Whoever reads them groups rows by example and adds all uses of a parameter before squaring (`square_sums.py`).
No rule reads a weight, so the rules hold while ZeRO-3 has the weights partitioned.

Source: continual.md section 3; Goodfellow 2015, arXiv 1510.01799 (per-example gradients of linear layers).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hsmn_dist.models.layers.norms import RMSNorm


@dataclass
class Outer:
    """dW = sum over rows of right^T left: `left` [rows, *, in], `right` [rows, *, out] for a weight [out, in]."""

    left: Tensor
    right: Tensor


@dataclass
class Scatter:
    """dW[id] = sum of `values` [rows, *, D] over the places of `ids` [rows, *] that hold id; ids below 0 are skipped."""

    ids: Tensor
    values: Tensor


@dataclass
class Dense:
    """dW = sum over rows of `values` [rows, *, *shape], already summed over all but rows: [rows, *shape]."""

    values: Tensor


Contribution = Outer | Scatter | Dense
Rule = Callable[[nn.Module, Tensor, Tensor], dict[str, Contribution]]


def rule_of(module: nn.Module) -> Rule | None:
    """The rule for the parameters that `module` itself holds, or None."""
    kind = _written_kind(type(module))
    if kind is nn.Embedding and not _is_plain_embedding(module):
        return None
    if kind in _RULES:
        return _RULES[kind]
    if _looks_like_rms_norm(module):
        return rms_norm_of_others
    return _transposed_linear if kind.__name__ == "Conv1D" and _is_transposed_linear(module) else None


def _written_kind(kind: type[nn.Module]) -> type[nn.Module]:
    """A module's class as it was written; `fully_shard` derives one from it that changes nothing but when weights are there."""
    bases = kind.__bases__
    return bases[1] if len(bases) == 2 and bases[0].__name__ == "FSDPModule" else kind


def _linear(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Contribution]:
    return {"weight": Outer(x, g), "bias": Dense(_row_sums(g, 1))}


def _transposed_linear(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Contribution]:
    return {"weight": Outer(g, x), "bias": Dense(_row_sums(g, 1))}


def _embedding(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Contribution]:
    padding = module.padding_idx
    ids = x if padding is None else x.masked_fill(x.eq(padding), -1)  # type: ignore[arg-type]
    return {"weight": Scatter(ids, g)}


def _layer_norm(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Contribution]:
    shape: tuple[int, ...] = tuple(module.normalized_shape)  # type: ignore[arg-type]
    normal = functional.layer_norm(x.float() if x.dtype in _HALF else x, shape, None, None, float(module.eps))  # type: ignore[arg-type]
    return {"weight": Dense(_row_sums(normal.mul_(g), len(shape))), "bias": Dense(_row_sums(g, len(shape)))}


def _rms_norm(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Contribution]:
    shape: tuple[int, ...] = tuple(module.normalized_shape)  # type: ignore[arg-type]
    eps = module.eps
    normal = functional.rms_norm(x.float() if x.dtype in _HALF else x, shape, None, eps)  # type: ignore[arg-type]
    return {"weight": Dense(_row_sums(normal.mul_(g), len(shape)))}


def rms_norm_of_others(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Contribution]:
    """RMSNorm as libraries write it for themselves (Llama's and its kin); `is_rms_norm` has to hold for the module."""
    normal = functional.rms_norm(x.float() if x.dtype in _HALF else x, x.shape[-1:], None, _epsilon(module))
    return {"weight": Dense(_row_sums(normal.mul_(g), 1))}


def is_rms_norm(module: nn.Module, x: Tensor, output: Tensor) -> bool:
    """Whether a module that only looks like an RMSNorm gave what one gives: x / rms(x) times weight, or times 1 + weight."""
    weight: Any = module.get_parameter("weight").detach()
    weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    if weight.shape != x.shape[-1:] or output.shape != x.shape:
        return False
    normal = functional.rms_norm(x.detach().float(), x.shape[-1:], None, _epsilon(module))
    found, tolerance = output.detach().float(), 3e-2 if output.dtype in _HALF else 1e-4
    bound = tolerance * (1e-6 + found.abs().max()) if found.numel() else 0.0
    return any(bool(((normal * scale - found).abs() <= bound).all()) for scale in (weight.float(), 1 + weight.float()))


_HALF = (torch.float16, torch.bfloat16)
_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    RMSNorm: _rms_norm,
}


def _row_sums(values: Tensor, num_kept: int) -> Tensor:
    """[rows, *, *shape] -> [rows, *shape], in fp32 or wider; `num_kept` is the number of dimensions of *shape."""
    values = values.float() if values.dtype in _HALF else values
    between = tuple(range(1, values.dim() - num_kept))
    return values.sum(between) if between else values


def _is_plain_embedding(module: nn.Module) -> bool:
    return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse


def _is_transposed_linear(module: nn.Module) -> bool:
    """Hugging Face's Conv1D, y = x W + b with W [in, out], without importing transformers to recognise it."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 2 and isinstance(getattr(module, "nf", None), int)


def _looks_like_rms_norm(module: nn.Module) -> bool:
    parts = dict(module.named_parameters(remove_duplicate=False))
    has_more = any(True for _ in module.children()) or any(True for _ in module.buffers())
    return list(parts) == ["weight"] and parts["weight"].dim() == 1 and not has_more and _epsilon(module) is not None


def _epsilon(module: nn.Module) -> float | None:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if isinstance(found, float) else None
