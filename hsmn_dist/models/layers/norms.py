"""Normalisation by name: PyTorch's own modules, and one that is faster than PyTorch's on a CPU.

Source: LayerNorm, arXiv 1607.06450; RMSNorm, arXiv 1910.07467.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hsmn_dist.models.tracing import is_traced

NormKind = Literal["layer", "rms"]


def build_norm(d_model: int, kind: NormKind = "layer", eps: float = 1e-6) -> nn.Module:
    """A norm over the last axis with a learned scale (and shift, for "layer")."""
    if kind == "rms":
        return RMSNorm(d_model, eps=eps)
    return nn.LayerNorm(d_model, eps=eps)


class RMSNorm(nn.RMSNorm):
    """x / rms(x) times a learned scale over the last axis, as `nn.RMSNorm` in every number and name.

    Unusual: without a GPU, torch takes the norm apart into nine operations with as many gradients; here they are four and five.
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """[*, D] -> [*, D]."""
        is_plain = x.device.type == "cpu" and x.dtype == self.weight.dtype and x.dtype in (torch.float32, torch.float64)
        if not is_plain or is_traced() or torch.is_autocast_enabled("cpu") or not x.numel():
            return super().forward(x)
        return _RmsNorm.apply(x, self.weight, self.eps)  # type: ignore[no-any-return,no-untyped-call]


class _RmsNorm(torch.autograd.Function):
    """y = w x r with r = (mean(x^2) + eps)^(-1/2); dx = r (w g - x r^2 mean(w g x)), dw = sum over rows of g x r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        product = gradient * x
        for_weight = product.reshape(-1, x.shape[-1]).mT @ scale.flatten()
        share = (product @ weight).unsqueeze(-1).mul_(scale**3).div_(-x.shape[-1])
        return (gradient * weight).mul_(scale).addcmul_(x, share), for_weight, None
