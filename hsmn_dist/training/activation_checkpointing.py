"""Recompute blocks in the backward pass, from outside the model.

Unusual: only torch's non-reentrant form, which is exact on every ZeRO stage; DeepSpeed's own fails under ZeRO-3. The wrapper
replaces the block's `forward` on the instance, so parameter names stay as they are. Source: Chen et al. 2016, arXiv 1604.06174.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hsmn_dist.models.contract import LanguageModel


def checkpoint_blocks(model: LanguageModel, policy: Literal["none", "every_block", "every_second_block"]) -> int:
    """Wrap `model.blocks` by policy; returns how many are wrapped. Evaluation runs them as they are."""
    step = {"none": 0, "every_block": 1, "every_second_block": 2}[policy]
    chosen = list(model.blocks)[::step] if step else []
    for block in chosen:
        _wrap(block)
    return len(chosen)


def _wrap(block: nn.Module) -> None:
    plain = block.forward

    @functools.wraps(plain)
    def recomputed(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*arguments, **named)
        return checkpoint(plain, *arguments, use_reentrant=False, **named)

    block.forward = recomputed  # type: ignore[method-assign]
