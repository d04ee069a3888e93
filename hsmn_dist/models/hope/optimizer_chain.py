"""OptimizerChain: the paper form of the CMS with `cadence: optimizer`; levels are parameters with update periods.

Between its updates a level is a constant; its gradients are summed by the optimizer (`optim/periodic.py`). Same chain as
`ChainMemory`, made of plain feed-forward modules. Source: arXiv 2512.24695 section 7, equations 70, 71, 73, 74.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hsmn_dist.config.models import CmsConfig
from hsmn_dist.foundation.param_role import ParamUpdate
from hsmn_dist.models.example_rows import per_example
from hsmn_dist.models.hope.mixers import SequenceInfo
from hsmn_dist.models.layers.feed_forward import FeedForward


class OptimizerChain(nn.Module):
    """[B, T, D] -> [B, T, D]; sequential or independent."""

    def __init__(self, d_model: int, settings: CmsConfig) -> None:
        super().__init__()
        self.settings = settings
        self._seen: dict[
            int, tuple[Tensor, Tensor, Tensor]
        ] = {}  # biases at first, biases last, updates; for health alone
        self.levels = nn.ModuleList(FeedForward(d_model, level.hidden_units, "gelu") for level in settings.levels)
        if settings.variant == "independent":
            self.mix = nn.Parameter(torch.empty(len(self.levels)))
            self.init_weights()

    def init_weights(self) -> None:
        """Equal shares of independent levels; the maps are drawn by the model."""
        if self.settings.variant == "independent":
            nn.init.constant_(self.mix, 1.0 / len(self.levels))

    @torch.no_grad()
    def _health(self) -> dict[str, Tensor]:
        """Per level: updates seen so far and the way its biases went. Weight decay leaves biases alone, so only gradients
        move them. A training step later than its update; nothing while a compiler traces or weights are sharded away.
        """
        if torch.compiler.is_compiling() or not self.training:
            return {}
        found: dict[str, Tensor] = {}
        for index, level in enumerate(self.levels):
            biases = [p.detach().flatten() for name, p in level.named_parameters() if name.endswith("bias")]
            now = torch.cat(biases).float()
            if now.numel() == 0:
                continue
            first, last, num_updates = self._seen.get(index, (now, now, now.new_zeros(())))
            if first.shape != now.shape or first.device != now.device:
                first, last, num_updates = now, now, now.new_zeros(())
            num_updates = num_updates + (now != last).any()
            self._seen[index] = (first, now, num_updates)
            found[f"memory/level_{index}_updates"] = num_updates
            found[f"memory/level_{index}_change_norm"] = (now - first).norm()
        return found

    def parameter_updates(self) -> dict[str, ParamUpdate]:
        """Period and rate by parameter name; period 0 (never inside a sequence) is every step."""
        return {
            f"levels.{index}.{name}": ParamUpdate(max(1, level.period), level.rate_scale)
            for index, level in enumerate(self.settings.levels)
            for name, _ in self.levels[index].named_parameters()
        }

    def forward(self, x: Tensor, state: Any, info: SequenceInfo) -> tuple[Tensor, Any, dict[str, Tensor]]:
        """[B, T, D] -> [B, T, D]; there is no fast state."""
        y = x
        is_independent = self.settings.variant == "independent"
        # Each [B, 1, 1].
        shares = per_example(self.mix, x.shape[0])[..., None, None].unbind(1) if is_independent else ()
        for index, level in enumerate(self.levels):
            if is_independent:
                out = level(x)
                out = shares[index].to(out.dtype) * out
            else:
                out = level(y)
            y = out if index == 0 else y + out
        return y, None, self._health()
