"""Rotary positions: tables of any length, computed in fp32 from integer positions; nothing is learned or stored.

Source: Su et al. 2021, arXiv 2104.09864, equation 34 (halves rotated together, the layout of GPT-NeoX).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hsmn_dist.foundation.errors import ModelError


class RotaryTable(NamedTuple):
    """Cosines and sines, [T, K/2], or [B, 1, T, K/2] when positions differ between rows."""

    cos: Tensor
    sin: Tensor


def rotary_table(positions: Tensor, head_dim: int, base: float = 10000.0) -> RotaryTable:
    """Tables for integer positions [T] or [B, T]; `head_dim` must be even."""
    if head_dim % 2:
        raise ModelError(
            f"rotary positions with a head width of {head_dim}",
            allowed="an even head width",
            action="change num_heads or d_model, or use learned positions",
        )
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angle = positions.to(torch.float32)[..., None] * base**-exponent
    if positions.dim() == 2:
        angle = angle[:, None]  # [B, 1, T, K/2]
    return RotaryTable(angle.cos(), angle.sin())


def rotate(x: Tensor, table: RotaryTable) -> Tensor:
    """Rotate x [B, H, T, K] by its positions; the table's own precision, x's type."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = table.cos.to(x.dtype), table.sin.to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
