"""Cross entropy of single tokens that keeps one table of M x V numbers, where PyTorch's makes four.

Unusual: the softmax is kept in place of its logarithm, for it is the gradient already but for one entry a row: dloss/dz = p - 1[label].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hsmn_dist.models.precision import wide_type
from hsmn_dist.models.tracing import is_traced


def token_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Losses [M] in nats of logits [M, V] and labels [M] in 0 .. V - 1; in fp32, in float64 of such logits."""
    if is_traced() or not logits.requires_grad or not torch.is_grad_enabled():
        return nn.functional.cross_entropy(logits.to(wide_type(logits)), labels, reduction="none")
    return _TokenCrossEntropy.apply(logits, labels)  # type: ignore[no-any-return,no-untyped-call]


class _TokenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        wide = wide_type(logits)
        probability = torch.softmax(logits, -1, dtype=wide)
        ctx.save_for_backward(probability, labels)
        ctx.dtype = logits.dtype
        picked = logits.gather(1, labels[:, None])[:, 0].to(wide)
        # By the likeliest label, whose probability is never rounded to 0 as that of `labels` may be.
        return logits.amax(-1).to(wide) - probability.amax(-1).log() - picked

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        probability, labels = ctx.saved_tensors
        rows, index = gradient[:, None], labels[:, None]
        # The label's own entry is rounded to the logits' precision after the subtraction, not before.
        own = (probability.gather(1, index) - 1.0) * rows
        found = torch.empty_like(probability, dtype=ctx.dtype)
        torch.mul(probability, rows, out=found)
        return found.scatter_(1, index, own.to(ctx.dtype)), None
