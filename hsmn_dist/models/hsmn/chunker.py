"""StreamingChunker: context tokens to overlapping chunks, as a view; and how many chunks each example owns.

Unusual: the number of chunks of an example depends on its own length alone, never on the batch it sits in.
Source: HSMN paper, StreamingChunker; models.md 1.1: C = max(min_chunks, ceil((n - c) / s) + 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hsmn_dist.foundation.errors import ModelError


@dataclass
class Chunks:
    """Chunks of a batch.

    Attributes:
        ids: [B, C, S] token ids, padded.
        mask: [B, C, S] bool, True on real tokens.
        num_chunks: [B] int64, chunks (tree leaves) that each example owns; between min_chunks and C.
    """

    ids: Tensor
    mask: Tensor
    num_chunks: Tensor


class StreamingChunker:
    """Cuts contexts into chunks of `chunk_size` tokens that start `chunk_stride` apart."""

    def __init__(self, chunk_size: int, chunk_stride: int, min_chunks: int, pad_id: int) -> None:
        if not 1 <= chunk_stride <= chunk_size:
            raise ModelError(
                f"chunk_stride {chunk_stride} with chunk_size {chunk_size}",
                allowed=f"a stride from 1 to {chunk_size}, so that no token falls between two chunks",
                action="change chunk_stride or chunk_size",
            )
        self.chunk_size = chunk_size
        self.chunk_stride = chunk_stride
        self.min_chunks = min_chunks
        self.pad_id = pad_id

    def num_chunks(self, num_tokens: int) -> int:
        """Chunks of a context of `num_tokens` tokens."""
        return max(self.min_chunks, -(-(num_tokens - self.chunk_size) // self.chunk_stride) + 1)

    def padded_tokens(self, num_chunks: int) -> int:
        """Tokens that `num_chunks` chunks cover."""
        return self.chunk_size + (num_chunks - 1) * self.chunk_stride

    def __call__(self, context_ids: Tensor, context_mask: Tensor) -> Chunks:
        """[B, n] ids and mask -> chunks; n may be 0."""
        num_tokens = context_ids.shape[1]
        num_chunks = self.num_chunks(num_tokens)
        missing = self.padded_tokens(num_chunks) - num_tokens
        ids = F.pad(context_ids.masked_fill(~context_mask, self.pad_id), (0, missing), value=self.pad_id)
        mask = F.pad(context_mask, (0, missing), value=False)
        position = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        lengths = (position * mask).amax(dim=1)  # one past the last real token
        owned = -((self.chunk_size - lengths) // self.chunk_stride) + 1
        return Chunks(
            ids=ids.unfold(1, self.chunk_size, self.chunk_stride),  # [B, C, S]
            mask=mask.unfold(1, self.chunk_size, self.chunk_stride),
            num_chunks=owned.clamp(min=self.min_chunks),
        )
