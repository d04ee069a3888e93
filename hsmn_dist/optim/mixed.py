"""Several torch optimizers behind one: each holds its own groups, and state and groups are shared with the whole.

Used for `torch.optim.Muon`, which takes matrices alone, beside AdamW for everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.optim.matrix_rule import check_matrices


class MixedOptimizer(torch.optim.Optimizer):
    """One optimizer made of `parts`; `param_groups` and `state` are theirs, so rates, saving and loading work as usual."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Give each part its slice of the groups, and the one state."""
        start = 0
        for part in self.parts:
            stop = start + len(part.param_groups)
            part.param_groups = self.param_groups[start:stop]
            part.state = self.state
            start = stop

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch; the parts see what was loaded."""
        super().load_state_dict(state_dict)
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only at construction: a later group would belong to no part."""
        if hasattr(self, "state") and len(self.param_groups) >= sum(len(part.param_groups) for part in self.parts):
            raise ModelError(
                "a parameter group added to a finished optimizer",
                allowed="all groups at construction",
                action="build a new optimizer",
            )
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every part."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_matrices(self.param_groups)
        for part in self.parts:
            part.step()
        return loss
