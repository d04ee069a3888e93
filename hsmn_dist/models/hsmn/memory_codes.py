"""From tree nodes to what the decoder attends to: decompression, plus a code of level and span position.

Unusual: span positions are sinusoids of the span's centre, counted in chunks, through a learned map, so there is no longest
context. With `uses_level_embedding` false nothing is added, which is the original. Source: models.md 1.5.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MAX_LEVELS = 48
NUM_FREQUENCIES = 16
LONGEST_PERIOD_CHUNKS = 100_000.0


def span_features(centre: Tensor, dtype: torch.dtype) -> Tensor:
    """Sines and cosines [..., 2F] of span centres [...], counted in chunks; computed in fp32 at least."""
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    exponent = torch.arange(NUM_FREQUENCIES, device=centre.device, dtype=precise) / (NUM_FREQUENCIES - 1)
    angle = centre.to(precise)[..., None] * LONGEST_PERIOD_CHUNKS**-exponent
    return torch.cat([angle.sin(), angle.cos()], dim=-1).to(dtype)


class MemoryCodes(nn.Module):
    """Code of a node: an embedding of its level plus a map of its span position."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.level_embedding = nn.Embedding(MAX_LEVELS, d_model)
        self.span_map = nn.Linear(2 * NUM_FREQUENCIES, d_model, bias=False)

    def forward(self, level: Tensor, first_leaf: Tensor, last_leaf: Tensor, dtype: torch.dtype) -> Tensor:
        """Level and span [first, last) of each node, all [B, N] int64 -> codes [B, N, D] of about `dtype`."""
        features = span_features((first_leaf + last_leaf - 1) * 0.5, dtype)
        return self.level_embedding(level) + self.span_map(features)
