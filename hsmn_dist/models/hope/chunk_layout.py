"""Where each token of a row stands among memory chunks, when rows have segments, padding or a chunk begun earlier.

A chunk boundary counts tokens of its own segment only, so that a packed segment is computed exactly as it would be alone
and a stream cut anywhere goes on exactly as uncut. Slots that hold no token are marked invalid and change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class ChunkLayout:
    """Tokens in slots; S is a multiple of the chunk size C, n = S / C.

    Attributes:
        source: [B, S] token of each slot (any token where invalid); None when slots are tokens.
        valid: [B, S] bool; None when every slot holds a token.
        slot: [B, T] slot of each token; None when slots are tokens.
        restarts: [B, n] bool, True where a chunk begins a new segment; None when none does.
        num_slots: S.
        chunk_size: C.
        num_whole: first chunks that are full of tokens in every row and begin no new segment, as far as shapes tell.
    """

    source: Tensor | None
    valid: Tensor | None
    slot: Tensor | None
    restarts: Tensor | None
    num_slots: int
    chunk_size: int
    num_whole: int = 0

    @property
    def num_chunks(self) -> int:
        """Chunks of each row."""
        return self.num_slots // self.chunk_size

    def placed(self, x: Tensor) -> Tensor:
        """[B, H, T, K] -> [B, H, S, K]."""
        if self.source is None:
            missing = self.num_slots - x.shape[2]
            return F.pad(x, (0, 0, 0, missing)) if missing else x
        index = self.source[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return x.gather(2, index)

    def returned(self, y: Tensor, num_tokens: int) -> Tensor:
        """[B, H, S, K] -> [B, H, T, K]."""
        if self.slot is None:
            return y[:, :, :num_tokens]
        index = self.slot[:, None, :, None].expand(-1, y.shape[1], -1, y.shape[3])
        return y.gather(2, index)


def chunk_layout(
    batch: int,
    tokens: int,
    chunk_size: int,
    segments: Tensor | None,
    valid: Tensor | None,
    offset: Tensor | None,
    device: torch.device,
) -> ChunkLayout:
    """Layout of `tokens` tokens a row.

    Args:
        batch: B.
        tokens: T.
        chunk_size: C.
        segments: [B, T] never-falling segment numbers; 0 continues what came before.
        valid: [B, T] bool, False on padding at the right end.
        offset: [B] tokens that segment 0 already has in its open chunk.
        device: of the result.
    """
    if segments is None and offset is None:
        num_slots = -(-tokens // chunk_size) * chunk_size
        num_whole = tokens // chunk_size if valid is None else 0
        if valid is None and num_slots != tokens:
            valid = torch.ones(batch, tokens, dtype=torch.bool, device=device)
        if valid is not None:
            valid = F.pad(valid, (0, num_slots - tokens))
        return ChunkLayout(None, valid, None, None, num_slots, chunk_size, num_whole)
    numbers = torch.zeros(batch, tokens, dtype=torch.long, device=device) if segments is None else segments
    is_token = torch.ones(batch, tokens, dtype=torch.bool, device=device) if valid is None else valid
    head = torch.zeros(batch, dtype=torch.long, device=device) if offset is None else offset
    num_segments = tokens + 1
    lengths = torch.zeros(batch, num_segments, dtype=torch.long, device=device)
    lengths.scatter_add_(1, numbers, is_token.long())
    has_tokens = lengths > 0
    filled = lengths + F.pad(head[:, None], (0, num_segments - 1)) * has_tokens
    slots = -(-filled // chunk_size) * chunk_size
    ends = slots.cumsum(1)
    base = ends - slots
    first = lengths.cumsum(1) - lengths  # tokens of earlier segments
    rank = is_token.long().cumsum(1) - 1 - first.gather(1, numbers)
    slot = base.gather(1, numbers) + rank + head[:, None] * (numbers == 0)
    num_slots = max(int(ends[:, -1].max()), chunk_size)
    slot = torch.where(is_token, slot, torch.full_like(slot, num_slots))
    tokens_index = torch.arange(tokens, device=device)[None].expand(batch, -1)
    source = torch.zeros(batch, num_slots + 1, dtype=torch.long, device=device).scatter_(1, slot, tokens_index)
    held = torch.zeros(batch, num_slots + 1, dtype=torch.bool, device=device).scatter_(1, slot, is_token)
    restarts = torch.zeros(batch, num_slots // chunk_size + 1, dtype=torch.bool, device=device)
    begins = has_tokens.clone()
    begins[:, 0] = False
    place = torch.where(begins, base // chunk_size, torch.full_like(base, restarts.shape[1] - 1))
    restarts.scatter_(1, place, torch.ones_like(begins))
    return ChunkLayout(
        source[:, :-1],
        held[:, :-1],
        slot.clamp(max=num_slots - 1),
        restarts[:, :-1] if segments is not None else None,
        num_slots,
        chunk_size,
    )
