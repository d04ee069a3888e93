"""TargetMemory: the continuum memory that a hybrid's reasoning block carries over the target tokens.

Unusual: nothing of the block or of the memory is copied; this only gives a CMS the call signature of a reasoning sublayer.
Imported by hybrids alone, so plain HSMN does not load the other family. Source: models.md 2.2 and 2.3.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hsmn_dist.config.models import HsmnHopeConfig
from hsmn_dist.models.hope.build_parts import build_cms
from hsmn_dist.models.hope.mixers import SequenceInfo


class TargetMemory(nn.Module):
    """A CMS of any configured form, reading and writing once for each target token."""

    def __init__(self, config: HsmnHopeConfig, block_index: int) -> None:
        super().__init__()
        self.memory = build_cms(config, block_index)

    def forward(self, x: Tensor, state: Any, returns_state: bool) -> tuple[Tensor, Any, dict[str, Tensor]]:
        """From x [B, T, D] and the state of earlier tokens (None: none) to [B, T, D], the new state, health scalars."""
        return self.memory(x, state, SequenceInfo(returns_state=returns_state))
