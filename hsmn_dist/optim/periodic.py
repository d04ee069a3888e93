"""AdamW whose groups may be updated every `period_steps` steps only, with the gradient summed in between.

This is the `cadence: optimizer` form of the continuum memory (arXiv 2512.24695, section 7, equations 70 and 71): level l
is a constant for C_l optimizer steps and then takes one step along the sum of its errors. Unusual: the sum lives in the
optimizer's state (saved with it), and everything is elementwise, so flat ZeRO partitions work as whole tensors do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class PeriodicAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` with the group option `period_steps` (default 1: plain AdamW).

    Between two updates of a group its values do not change at all (no decay either), and its moments stand still.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, with `period_steps` filled in."""
        param_group.setdefault("period_steps", 1)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step: groups whose period ends now are updated, the others only collect."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        finished: list[Tensor] = []
        for group in self.param_groups:
            if group["period_steps"] > 1:
                for parameter in group["params"]:
                    if parameter.grad is not None and self._collect(parameter, group):
                        finished.append(parameter)
        super().step()
        for parameter in finished:
            self.state[parameter]["gradient_sum"].zero_()
        return loss

    def _collect(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        """Add the gradient to the sum; hand the sum over at the end of a period, else hide the gradient."""
        state = self.state[parameter]
        if not state:
            # torch fills an empty state only, so all of it is made here.
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["gradient_sum"] = torch.zeros_like(parameter)
            state["num_collected"] = torch.tensor(0)
        assert parameter.grad is not None
        state["gradient_sum"].add_(parameter.grad)
        state["num_collected"] = (state["num_collected"] + 1) % group["period_steps"]
        is_due = int(state["num_collected"]) == 0
        parameter.grad = state["gradient_sum"].clone() if is_due else None
        return is_due
