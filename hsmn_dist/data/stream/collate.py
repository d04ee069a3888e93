"""Token arrays -> one micro-batch of tensors; the keys equal ModelInput's fields, plus `example_index`.

Rows are left-aligned and padded at the end. A row that holds nothing (a damaged sample, or a rank with fewer rows than the
others) gets one real token in context and target, so that no model meets an empty attention, and an all-False loss mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hsmn_dist.data.shards.reader import Tokens

PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
NO_EXAMPLE = -1


@dataclass
class Row:
    """One row of a batch: token pairs of its examples (one, unless packed; none for an empty row) and the first's index."""

    examples: list[Tokens]
    example_index: int = NO_EXAMPLE


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Unpacked rows -> context_ids [B, n], context_mask [B, n], target_ids [B, T], loss_mask [B, T], example_index [B]."""
    pairs = [row.examples[0] if row.examples else _EMPTY for row in rows]
    context_ids, context_mask = _padded([pair[0] for pair in pairs])
    target_ids, loss_mask = _padded([pair[1] for pair in pairs])
    for number, row in enumerate(rows):
        if not row.examples:
            loss_mask[number] = False
    return {
        "context_ids": torch.from_numpy(context_ids),
        "context_mask": torch.from_numpy(context_mask),
        "target_ids": torch.from_numpy(target_ids),
        "loss_mask": torch.from_numpy(loss_mask),
        "example_index": torch.tensor([row.example_index for row in rows], dtype=torch.int64),
    }


def collate_packed(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Packed rows: every example's context and target behind each other in `target_ids`, contexts not scored.

    `segment_ids` [B, T] counts a row's examples from 1 and is 0 on padding; `context_ids` is [B, 0].
    """
    lines = [[np.concatenate(pair) for pair in row.examples] or [_EMPTY[1]] for row in rows]
    target_ids, is_token = _padded([np.concatenate(line) for line in lines])
    loss_mask = np.zeros_like(is_token)
    segment_ids = np.zeros(target_ids.shape, dtype=np.int64)
    for number, (row, line) in enumerate(zip(rows, lines, strict=True)):
        start = 0
        for segment, tokens in enumerate(line, start=1):
            segment_ids[number, start : start + len(tokens)] = segment
            if row.examples:
                loss_mask[number, start + len(row.examples[segment - 1][0]) : start + len(tokens)] = True
            start += len(tokens)
    return {
        "context_ids": torch.zeros((len(rows), 0), dtype=torch.int64),
        "context_mask": torch.zeros((len(rows), 0), dtype=torch.bool),
        "target_ids": torch.from_numpy(target_ids),
        "loss_mask": torch.from_numpy(loss_mask),
        "segment_ids": torch.from_numpy(segment_ids),
        "example_index": torch.tensor([row.example_index for row in rows], dtype=torch.int64),
    }


def padding_counts(batch: dict[str, Tensor]) -> tuple[int, int]:
    """Padded positions and all positions of a batch, context and target together."""
    is_token = batch["segment_ids"] > 0 if "segment_ids" in batch else batch["target_ids"] != PAD_ID
    total = batch["context_mask"].numel() + is_token.numel()
    return total - int(batch["context_mask"].sum()) - int(is_token.sum()), total


def _padded(arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(array) for array in arrays])
    mask = np.arange(lengths.max()) < lengths[:, None]  # [B, longest]
    ids = np.full(mask.shape, PAD_ID, dtype=np.int64)
    ids[mask] = np.concatenate(arrays)
    return ids, mask


_EMPTY: Tokens = (np.array([BOS_ID], dtype=np.int64), np.array([EOS_ID], dtype=np.int64))
