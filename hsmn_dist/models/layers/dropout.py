"""Dropout, and the residual that it is added to.

Unusual: without a GPU, torch draws one random number of 64 bits for every element and keeps the mask in the activation's type. Here
such a number decides about four elements, and the mask takes a byte. Source: Srivastava et al. 2014, JMLR 15.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hsmn_dist.models.tracing import is_traced

LEVELS = 2**16


class Dropout(nn.Dropout):
    """`nn.Dropout`, with the sum that follows it.

    On a CPU the share of zeroed elements is `p` rounded to a 65,536th; what is kept is scaled by the share itself, so that the
    expectation is that of the input exactly.
    """

    def forward(self, x: Tensor, added_to: Tensor | None = None) -> Tensor:
        """dropout(x) [*], or with `added_to` [*]: added_to + dropout(x)."""
        if not self.training or self.p == 0 or not self._is_written_out(x, added_to):
            dropped = super().forward(x)
            return dropped if added_to is None else added_to + dropped
        return _Dropped.apply(x, added_to, round(self.p * LEVELS))  # type: ignore[no-any-return,no-untyped-call]

    def _is_written_out(self, x: Tensor, added_to: Tensor | None) -> bool:
        if x.device.type != "cpu" or is_traced() or not 0 < round(self.p * LEVELS) < LEVELS:
            return False
        return added_to is None or (added_to.dtype == x.dtype and added_to.shape == x.shape)


class _Dropped(torch.autograd.Function):
    """y = a + s m x with m zero for `zeroed` in 65,536 elements and s = 1 / mean(m); dx = s m dy, da = dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, added_to: Tensor | None, zeroed: int) -> Tensor:
        drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        mask = (drawn.view(torch.int16)[: x.numel()] >= zeroed - LEVELS // 2).view(x.shape)
        ctx.save_for_backward(mask)
        ctx.scale = LEVELS / (LEVELS - zeroed)
        start = x.new_zeros(()) if added_to is None else added_to
        kept = _as_numbers(mask, x.dtype)
        return torch.addcmul(start, x, kept, value=ctx.scale, out=kept)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        for_x = None
        if ctx.needs_input_grad[0]:
            (mask,) = ctx.saved_tensors
            for_x = torch.addcmul(gradient.new_zeros(()), gradient, _as_numbers(mask, gradient.dtype), value=ctx.scale)
        return for_x, gradient if ctx.needs_input_grad[1] else None, None


def _as_numbers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Ones and zeros; a product with a mask itself takes twice as long."""
    return mask.view(torch.uint8).to(dtype)
