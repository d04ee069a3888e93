"""HopeBlock: x + mixer(norm x), x + CMS(norm x), x + MLP(norm x); one class for every combination.

Unusual: the parts are passed in, so no variant is a copy of another; pre-norm is our choice (the simple variant does not
say). Source: models.md section 2; Nested Learning (arXiv 2512.24695), sections 7 and 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hsmn_dist.models.hope.fast_state import FastState
from hsmn_dist.models.hope.mixers import SequenceInfo
from hsmn_dist.models.layers.dropout import Dropout
from hsmn_dist.models.layers.norms import RMSNorm


@dataclass
class BlockState(FastState):
    """States of the block's mixer and of its CMS; None for parts without any."""

    mixer: Any = None
    cms: Any = None


class HopeBlock(nn.Module):
    """One block. `mixer` and `cms` map (x, state, info) to (y, state, health scalars); `mlp` maps x to y."""

    def __init__(
        self, d_model: int, mixer: nn.Module, cms: nn.Module | None, mlp: nn.Module | None, dropout: float
    ) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(d_model)
        self.mixer = mixer
        self.cms_norm = RMSNorm(d_model) if cms is not None else None
        self.cms = cms
        self.mlp_norm = RMSNorm(d_model) if mlp is not None else None
        self.mlp = mlp
        self.dropout = Dropout(dropout)

    def forward(
        self, x: Tensor, state: BlockState | None, info: SequenceInfo
    ) -> tuple[Tensor, BlockState | None, dict[str, Tensor]]:
        """[B, T, D] -> [B, T, D], the states after the last token when wanted, and named health scalars."""
        before = BlockState() if state is None else state
        after = BlockState()
        health: dict[str, Tensor] = {}
        y, after.mixer, scalars = self.mixer(self.mixer_norm(x), before.mixer, info)
        health.update(scalars)
        x = self.dropout(y, x)
        if self.cms is not None and self.cms_norm is not None:
            y, after.cms, scalars = self.cms(self.cms_norm(x), before.cms, info)
            health.update(scalars)
            x = self.dropout(y, x)
        if self.mlp is not None and self.mlp_norm is not None:
            x = self.dropout(self.mlp(self.mlp_norm(x)), x)
        return x, after if info.returns_state else None, health


class DecayMemory(nn.Module):
    """Gives `ContinuumMemory` the call signature of a block part."""

    def __init__(self, memory: nn.Module) -> None:
        super().__init__()
        self.memory = memory

    def forward(self, x: Tensor, state: Any, info: SequenceInfo) -> tuple[Tensor, Any, dict[str, Tensor]]:
        """See `ContinuumMemory.forward`."""
        y, after = self.memory(x, state, info.reset, valid=info.valid, returns_state=info.returns_state)
        return y, after, {}
