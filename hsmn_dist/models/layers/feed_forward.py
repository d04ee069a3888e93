"""Position-wise feed-forward maps: plain (two maps) and gated (three).

Source: Vaswani et al. 2017, section 3.3; gated: Shazeer 2020, arXiv 2002.05202.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from hsmn_dist.models.layers.dropout import Dropout

Activation = Literal["relu", "gelu", "silu"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


class FeedForward(nn.Module):
    """Outer(dropout(activation(inner(x)))); [..., D] -> [..., D]."""

    def __init__(
        self,
        d_model: int,
        d_feed_forward: int,
        activation: Activation = "relu",
        dropout: float = 0.0,
        has_bias: bool = True,
    ) -> None:
        super().__init__()
        self.inner = nn.Linear(d_model, d_feed_forward, bias=has_bias)
        self.outer = nn.Linear(d_feed_forward, d_model, bias=has_bias)
        self.activation = ACTIVATIONS[activation]
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.outer(self.dropout(self.activation(self.inner(x))))


class GatedFeedForward(nn.Module):
    """Outer(dropout(activation(gate(x)) * inner(x))); [..., D] -> [..., D]."""

    def __init__(
        self,
        d_model: int,
        d_feed_forward: int,
        activation: Activation = "silu",
        dropout: float = 0.0,
        has_bias: bool = False,
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, d_feed_forward, bias=has_bias)
        self.inner = nn.Linear(d_model, d_feed_forward, bias=has_bias)
        self.outer = nn.Linear(d_feed_forward, d_model, bias=has_bias)
        self.activation = ACTIVATIONS[activation]
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.outer(self.dropout(self.activation(self.gate(x)) * self.inner(x)))
