"""Normalisation by name: PyTorch's own modules, so that per-module hooks know them.

Source: LayerNorm, arXiv 1607.06450; RMSNorm, arXiv 1910.07467.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

NormKind = Literal["layer", "rms"]


def build_norm(d_model: int, kind: NormKind = "layer", eps: float = 1e-6) -> nn.Module:
    """A norm over the last axis with a learned scale (and shift, for "layer")."""
    if kind == "rms":
        return nn.RMSNorm(d_model, eps=eps)
    return nn.LayerNorm(d_model, eps=eps)
