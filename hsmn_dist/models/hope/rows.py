"""How HOPE lays a micro-batch out: [bos] + context + targets in one left-aligned row, padding only at the right end.

Target t is predicted at position n + t, n being the row's own context length; the last target is never read. Packed rows
(several segments) read <bos> at each segment's first token, restart positions there, and let nothing cross.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.models.contract import BOS_ID, ModelInput
from hsmn_dist.models.input_checks import check_ids, check_left_aligned


@dataclass
class Rows:
    """Token rows.

    Attributes:
        tokens: [B, L] ids that are read.
        context_lengths: [B] position of the first target's prediction.
        positions: [B, L] position of each token inside its segment.
        segments: [B, L] never-falling integers, 0 first; None without packing.
        valid: [B, L] bool, False on padding at the right end.
        pending: [B] each row's last token, which is not read yet: its last target; without one the last of its context;
            without that either, what was pending before.
    """

    tokens: Tensor
    context_lengths: Tensor
    positions: Tensor
    segments: Tensor | None
    valid: Tensor
    pending: Tensor


def build_rows(inputs: ModelInput, first: Tensor | None, pad_id: int) -> Rows:
    """Rows of a micro-batch.

    Args:
        inputs: the micro-batch.
        first: [B] the token that stands before the context (a carried stream's pending one); None means <bos>.
        pad_id: id of padding in targets.

    Raises:
        ModelError: no target column, or rows of different numbers.
    """
    context, target = inputs.context_ids, inputs.target_ids
    _check_shapes(inputs)
    batch, width = target.shape
    device = target.device
    lengths = inputs.context_mask.sum(1)  # [B]
    if first is None:
        first = torch.full((batch,), BOS_ID, dtype=target.dtype, device=device)
    read = target  # what is read in front of each target
    if inputs.segment_ids is not None:
        starts = _starts(inputs.segment_ids)
        # The token before a segment's first target is <bos>, not the last token of the segment before.
        read = torch.where(torch.roll(starts, -1, 1), torch.full_like(target, BOS_ID), target)
    index = torch.arange(context.shape[1] + width, device=device)[None].expand(batch, -1)
    where_target = index - lengths[:, None] - 1
    tokens = _picked(read, where_target)
    if context.shape[1]:
        tokens = torch.where(index <= lengths[:, None], _picked(context, index - 1), tokens)
    tokens = torch.where(index == 0, first[:, None], tokens)
    num_targets = _num_targets(target, inputs.loss_mask, pad_id)
    valid = index < (lengths + num_targets)[:, None]
    tokens = torch.where(valid | (index == 0), tokens, torch.full_like(tokens, pad_id))
    pending = _pending(inputs, first, lengths, num_targets)
    if inputs.segment_ids is None:
        return Rows(tokens, lengths, index, None, valid, pending)
    numbers = _starts(inputs.segment_ids).long().cumsum(1) - 1
    segments = _picked(numbers, index - lengths[:, None])
    segments = torch.where(index <= lengths[:, None], torch.zeros_like(segments), segments)
    before = torch.cat([segments[:, :1], segments[:, :-1]], 1)
    origin = torch.where(segments != before, index, torch.zeros_like(index)).cummax(1).values
    return Rows(tokens, lengths, index - origin, segments, valid, pending)


def reset_points(segments: Tensor) -> Tensor:
    """[B, T] never-falling segment numbers, 0 continuing -> True at the first token of each later segment."""
    before = torch.cat([torch.zeros_like(segments[:, :1]), segments[:, :-1]], 1)
    return segments != before


def _pending(inputs: ModelInput, first: Tensor, lengths: Tensor, num_targets: Tensor) -> Tensor:
    """The token behind those that a row reads: a piece of a stream may hold nothing for a row but padding."""
    context, target = inputs.context_ids, inputs.target_ids
    before = first
    if context.shape[1]:
        before = torch.where(lengths > 0, _picked(context, lengths[:, None] - 1)[:, 0], first)
    return torch.where(num_targets > 0, _picked(target, num_targets[:, None] - 1)[:, 0], before)


def _picked(source: Tensor, index: Tensor) -> Tensor:
    """source[b, index[b, j]] with the index held inside the row."""
    return source.gather(1, index.clamp(0, source.shape[1] - 1))


def _starts(segment_ids: Tensor) -> Tensor:
    """True at the first target of every segment."""
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return starts


def _num_targets(target: Tensor, loss_mask: Tensor, pad_id: int) -> Tensor:
    """Targets of each row without padding at the end: [B]."""
    is_real = (target != pad_id) | loss_mask
    places = torch.arange(1, target.shape[1] + 1, device=target.device)
    return (is_real * places).amax(1)


def _check_shapes(inputs: ModelInput) -> None:
    check_ids(inputs.context_ids, inputs.context_mask, "context")
    check_ids(inputs.target_ids, inputs.loss_mask, "target")
    check_left_aligned(inputs.context_mask, "context")
    shapes = {
        "context_ids": inputs.context_ids.shape,
        "context_mask": inputs.context_mask.shape,
        "target_ids": inputs.target_ids.shape,
        "loss_mask": inputs.loss_mask.shape,
    }
    wrong = (
        inputs.target_ids.shape[1] == 0
        or inputs.context_ids.shape[0] != inputs.target_ids.shape[0]
        or (inputs.segment_ids is not None and inputs.segment_ids.shape != inputs.target_ids.shape)
    )
    if wrong:
        raise ModelError(
            "a micro-batch of shapes " + ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items()),
            allowed="context_ids and context_mask [B, n] with n >= 0; target_ids, loss_mask and segment_ids [B, T], T >= 1",
            action="give every row at least one target token (an empty answer is the single token <eos>)",
        )
