"""The type for sums, states and normalisers that half precision would spoil."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_type(tensor: Tensor) -> torch.dtype:
    """fp32, or the tensor's own type where that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)
