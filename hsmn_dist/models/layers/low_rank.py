"""A linear map of bounded rank, kept as two factors; their product is never formed.

Source: HSMN paper, Aggregator; hsmn.md section 1 (LowRankDense, which multiplied the factors first).
"""

from __future__ import annotations

from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """y = second(first(x)), first: d_in -> rank without bias, second: rank -> d_out with bias."""

    def __init__(self, d_in: int, d_out: int, rank: int) -> None:
        super().__init__()
        self.first = nn.Linear(d_in, rank, bias=False)
        self.second = nn.Linear(rank, d_out)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_out]."""
        return self.second(self.first(x))
