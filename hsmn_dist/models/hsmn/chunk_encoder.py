"""ChunkEncoder: one embedding for each chunk, read at a CLS position in front of it.

Unusual: row 0 of the position table is the CLS token, and the last layer computes the CLS row alone, which is exact and
saves nearly half of the work (its keys and values are still those of the whole chunk). Source: HSMN paper, ChunkEncoder.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hsmn_dist.models.example_rows import current_rows, example_rows
from hsmn_dist.models.layers.attention import Attention
from hsmn_dist.models.layers.feed_forward import Activation, FeedForward
from hsmn_dist.models.layers.norms import build_norm


def announced_rows(owners: Tensor | None) -> AbstractContextManager[None]:
    """`example_rows`, except inside torch.compile, which cannot trace it (and where nobody listens)."""
    return nullcontext() if torch.compiler.is_compiling() else example_rows(owners)


class EncoderLayer(nn.Module):
    """Full attention inside a chunk, then a feed-forward; norms in front ("pre") or behind ("post", the original)."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_feed_forward: int,
        dropout: float,
        activation: Activation = "relu",
        is_pre_norm: bool = True,
    ) -> None:
        super().__init__()
        self.attention_norm = build_norm(d_model)
        self.attention = Attention(d_model, num_heads)
        self.feed_forward_norm = build_norm(d_model)
        self.feed_forward = FeedForward(d_model, d_feed_forward, activation)
        self.dropout = nn.Dropout(dropout)
        self.is_pre_norm = is_pre_norm

    def forward(self, x: Tensor, key_mask: Tensor, num_rows: int) -> Tensor:
        """From x [R, S + 1, D] and key_mask [R, 1, 1, S + 1] -> the first `num_rows` positions, [R, num_rows, D]."""
        if self.is_pre_norm:
            normed = self.attention_norm(x)
            read = self.attention(normed[:, :num_rows], normed, mask=key_mask)
            x = x[:, :num_rows] + self.dropout(read)
            return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        read = self.attention(x[:, :num_rows], x, mask=key_mask)
        x = self.attention_norm(x[:, :num_rows] + self.dropout(read))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class ChunkEncoder(nn.Module):
    """Embedded chunk tokens -> one vector for each chunk.

    With `group_chunks` > 0 chunks go through in groups that are recomputed in the backward pass: memory for one group
    instead of for the whole context. The number of groups differs between ranks, so ZeRO-3 must then gather this module
    as a whole (`LanguageModel.gathered_whole`).
    """

    def __init__(
        self, layers: list[EncoderLayer], d_model: int, chunk_size: int, dropout: float, group_chunks: int = 0
    ) -> None:
        super().__init__()
        self.position_embedding = nn.Embedding(chunk_size + 1, d_model)
        self.layers = nn.ModuleList(layers)
        self.final_norm = build_norm(d_model) if layers[0].is_pre_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.group_chunks = group_chunks

    def forward(self, embedded: Tensor, mask: Tensor) -> Tensor:
        """Embedded tokens [R, S, D] of R chunks, mask [R, S] -> CLS vectors [R, D]."""
        if not 0 < self.group_chunks < embedded.shape[0]:
            return self._encode(embedded, mask, None if torch.compiler.is_compiling() else current_rows())
        owners = None if torch.compiler.is_compiling() else current_rows()
        groups = []
        for start in range(0, embedded.shape[0], self.group_chunks):
            part = slice(start, start + self.group_chunks)
            rows = None if owners is None else owners[part]
            if torch.is_grad_enabled():
                groups.append(checkpoint(self._encode, embedded[part], mask[part], rows, use_reentrant=False))
            else:
                groups.append(self._encode(embedded[part], mask[part], rows))
        return torch.cat(groups)

    def _encode(self, embedded: Tensor, mask: Tensor, owners: Tensor | None) -> Tensor:
        num_chunks, chunk_size, _ = embedded.shape
        with announced_rows(owners):
            positions = torch.arange(chunk_size + 1, device=mask.device).expand(num_chunks, -1)
            x = self.dropout(F.pad(embedded, (0, 0, 1, 0)) + self.position_embedding(positions))  # [R, S + 1, D]
            key_mask = F.pad(mask, (1, 0), value=True)[:, None, None, :]
            last = len(self.layers) - 1
            for index, layer in enumerate(self.layers):
                x = layer(x, key_mask, 1 if index == last else chunk_size + 1)
            return self.final_norm(x[:, 0])  # [R, D]
