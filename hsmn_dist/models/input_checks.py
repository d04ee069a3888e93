"""What no family can take, refused in three parts before it becomes a wrong number or an error of torch.

Whatever needs the tensors' contents is checked on the CPU only: on a GPU it would stall every step (the loader gives sound rows
there), and under a compiler it would break the graph. Shapes and types are checked everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.models.contract import ModelInput


def may_look_at(tensor: Tensor) -> bool:
    """True when reading the tensor's contents costs no wait and breaks no graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and tensor.numel() > 0


def check_ids(ids: Tensor, mask: Tensor | None, name: str) -> None:
    """Raises ModelError unless `ids` are integers [B, t] with B >= 1, and the mask, if any, is bool of that shape."""
    is_wrong = ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool or ids.shape[0] == 0
    if mask is not None:
        is_wrong = is_wrong or mask.shape != ids.shape or mask.dtype != torch.bool
    if is_wrong:
        masked = "" if mask is None else f" with a mask {list(mask.shape)} of {mask.dtype}"
        raise ModelError(
            f"{name} ids {list(ids.shape)} of {ids.dtype}{masked}",
            allowed="integers [batch, tokens] of at least one row, and a bool mask of the same shape",
            action="mend the collate function",
        )


def check_one_each(token_ids: Tensor) -> None:
    """Raises ModelError unless new tokens come as one for each row, [B]."""
    if token_ids.dim() != 1:
        raise ModelError(
            f"new tokens of shape {list(token_ids.shape)}",
            allowed="one token a row: integers [batch]",
            action="pass logits.argmax(-1), or the next column of the target",
        )


def check_left_aligned(mask: Tensor, name: str) -> None:
    """Raises ModelError when a row of `mask` [B, t] has padding in front of a token."""
    if not may_look_at(mask):
        return
    is_late = (mask[:, 1:] & ~mask[:, :-1]).any(1)
    if bool(is_late.any()):
        raise ModelError(
            f"a {name} mask with padding in front of tokens, first in row {int(is_late.long().argmax())}",
            allowed="left-aligned rows: tokens first, padding behind them",
            action="pad on the right (a tokenizer's padding_side='right'), or move each row's tokens to the front",
        )


def check_continuations(inputs: ModelInput, owners: Tensor) -> None:
    """Raises ModelError unless R >= 1 targets of T >= 1 tokens belong to contexts by `owners` [R]."""
    check_ids(inputs.context_ids, inputs.context_mask, "context")
    check_ids(inputs.target_ids, inputs.loss_mask, "target")
    num_contexts, (num_targets, width) = inputs.context_ids.shape[0], inputs.target_ids.shape
    is_wrong = width == 0 or owners.shape != (num_targets,) or owners.is_floating_point()
    if not is_wrong and may_look_at(owners):
        is_wrong = int(owners.min()) < 0 or int(owners.max()) >= num_contexts
    if is_wrong:
        raise ModelError(
            f"targets {[num_targets, width]} and owners {list(owners.shape)} for {num_contexts} contexts",
            allowed="targets [R, T] with T >= 1, and [R] integers that number the contexts from 0",
            action="give each target the row of its context; leave out targets without tokens",
        )
