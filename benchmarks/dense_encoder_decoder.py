"""The plain rival of HSMN: an encoder over the whole context, a decoder that attends to every context token.

Same widths, layers, tables and head; attention by `scaled_dot_product_attention`, sinusoidal positions, pre-norm, no chunks,
no tree. Only the compressor, the tree and the decompressor (under one percent of the parameters) have no counterpart.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hsmn_dist.config.models import HsmnConfig
from hsmn_dist.models.contract import BOS_ID, ModelInput
from hsmn_dist.models.layers.attention import Attention
from hsmn_dist.models.layers.feed_forward import FeedForward


def sinusoids(num_positions: int, width: int) -> Tensor:
    """Positions [n, D] (Vaswani et al. 2017, section 3.5)."""
    rate = 10000.0 ** (-torch.arange(0, width, 2) / width)
    angle = torch.arange(num_positions)[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class Layer(nn.Module):
    """Self-attention, optional cross-attention, feed-forward."""

    def __init__(self, config: HsmnConfig, dropout: float, is_causal: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(config.d_model) for _ in range(3 if is_causal else 2))
        self.attention = Attention(config.d_model, config.num_heads)
        self.cross = Attention(config.d_model, config.num_heads) if is_causal else None
        self.feed_forward = FeedForward(config.d_model, config.d_feed_forward, "relu")
        self.dropout = nn.Dropout(dropout)
        self.is_causal = is_causal

    def forward(self, x: Tensor, memory: Tensor | None) -> Tensor:
        """[B, T, D] over memory [B, n, D] -> [B, T, D]."""
        x = x + self.dropout(self.attention(self.norms[0](x), is_causal=self.is_causal))
        if self.cross is not None:
            x = x + self.dropout(self.cross(self.norms[2](x), memory))
        return x + self.dropout(self.feed_forward(self.norms[1](x)))


class DenseEncoderDecoder(nn.Module):
    """Context [B, n] and target [B, T] to the mean loss."""

    def __init__(self, config: HsmnConfig) -> None:
        super().__init__()
        self.context_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.target_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = nn.ModuleList(
            Layer(config, config.encoder_dropout, False) for _ in range(config.num_encoder_layers)
        )
        self.decoder = nn.ModuleList(
            Layer(config, config.decoder_dropout, True) for _ in range(config.num_decoder_layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(config.d_model) for _ in range(2))
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def forward(self, inputs: ModelInput) -> Tensor:
        """Mean loss in nats."""
        width = self.head.in_features
        x = self.context_embedding(inputs.context_ids) + sinusoids(inputs.context_ids.shape[1], width)
        for layer in self.encoder:
            x = layer(x, None)
        memory = self.norms[0](x)
        first = torch.full_like(inputs.target_ids[:, :1], BOS_ID)
        y = self.target_embedding(torch.cat([first, inputs.target_ids[:, :-1]], dim=1))
        y = y + sinusoids(y.shape[1], width)
        for layer in self.decoder:
            y = layer(y, memory)
        return F.cross_entropy(self.head(self.norms[1](y)).flatten(0, 1), inputs.target_ids.flatten())
