"""The plain rival of HOPE: a pre-norm decoder with rotary SDPA attention and a GELU feed-forward, no memory of any kind."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hsmn_dist.models.layers.rotary import RotaryTable, rotary_table, rotate


class DenseBlock(nn.Module):
    """Pre-norm attention (SDPA, rotary) and MLP."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.project, self.output = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, table: RotaryTable) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        batch, tokens, width = x.shape
        heads = (
            t.reshape(batch, tokens, self.heads, -1).transpose(1, 2) for t in self.project(self.norm1(x)).chunk(3, -1)
        )
        query, key, value = heads
        read = F.scaled_dot_product_attention(rotate(query, table), rotate(key, table), value, is_causal=True)
        x = x + self.output(read.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class DenseDecoder(nn.Module):
    """The plain decoder; `hidden` is the width of its feed-forward."""

    def __init__(self, vocab: int, width: int, layers: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.embedding = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(DenseBlock(width, heads, hidden) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width, eps=1e-6), nn.Linear(width, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mean loss of the next tokens of [B, T + 1]."""
        table = rotary_table(torch.arange(tokens.shape[1] - 1, device=tokens.device), self.head_dim)
        x = self.embedding(tokens[:, :-1])
        for block in self.blocks:
            x = block(x, table)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), tokens[:, 1:].flatten())


def num_parameters(model: nn.Module) -> int:
    """Elements of all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def dense_decoder_of(vocab: int, width: int, layers: int, heads: int, total: int) -> DenseDecoder:
    """The dense decoder whose feed-forward width brings its parameters as close to `total` as possible."""
    bare = num_parameters(DenseDecoder(vocab, width, layers, heads, 1)) - layers * (2 * width + 1)
    hidden = max(1, round((total - bare) / (layers * (2 * width + 1))))
    return DenseDecoder(vocab, width, layers, heads, hidden)
