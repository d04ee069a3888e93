"""Base of our own optimizers: a matrix rule for groups of rule "matrix", AdamW for all others.

Unusual: all state lies in `self.state` as tensors of the parameter's shape or as scalars, so it is saved, sharded and
loaded like AdamW's, bit for bit; non-matrix parameters always fall to AdamW with the group's betas (arXiv 1711.05101).
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.optim.param_groups import ELEMENTWISE_RULE, MATRIX_RULE


class MatrixRuleOptimizer(torch.optim.Optimizer, abc.ABC):
    """One step: `update_matrix` for each matrix, AdamW for each other parameter.

    Args:
        params: parameters or groups; a group's `rule` is "matrix" (two-dimensional parameters alone) or "elementwise".
            Plain parameters are matrices where they have two dimensions.
        defaults: lr, weight_decay, betas, eps and the rule's own options.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        groups = list(params)
        if groups and isinstance(groups[0], Tensor):
            matrices = [p for p in groups if p.dim() == 2]
            others = [p for p in groups if p.dim() != 2]
            groups = [
                {"params": chosen, "rule": rule}
                for chosen, rule in ((matrices, MATRIX_RULE), (others, ELEMENTWISE_RULE))
                if chosen
            ]
        super().__init__(groups, {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, **defaults})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, with the rule checked."""
        param_group.setdefault("rule", ELEMENTWISE_RULE)
        super().add_param_group(param_group)
        check_matrices(self.param_groups[-1:])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step; parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_matrices(self.param_groups)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["step"] = state.get("step", torch.zeros((), dtype=torch.float32)) + 1.0
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                if group["rule"] == MATRIX_RULE:
                    self.update_matrix(parameter, parameter.grad.to(_wide(parameter)), state, group)
                else:
                    adam_update(parameter, parameter.grad, state, group)
        return loss

    @abc.abstractmethod
    def update_matrix(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Change a matrix in place; `state["step"]` counts from 1, decay has been applied."""


def check_matrices(groups: Iterable[dict[str, Any]]) -> None:
    """Refuse a matrix rule over anything but whole matrices (ZeRO stages above 0 put flat pieces into the groups).

    Raises:
        ModelError: a parameter of a "matrix" group has not two dimensions.
    """
    wrong = [tuple(p.shape) for g in groups if g["rule"] == MATRIX_RULE for p in g["params"] if p.dim() != 2]
    if wrong:
        raise ModelError(
            f"a matrix rule for parameters of shape {wrong[:3]}",
            allowed="two-dimensional parameters (whole ones, not ZeRO's flat pieces)",
            action="give each matrix an owner rank as training.owned_matrices does, or use optim.optimizer.kind adam",
        )


def adam_update(parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """Adam with bias correction, in place."""
    first, second = buffer(parameter, state, "exp_avg"), buffer(parameter, state, "exp_avg_sq")
    beta1, beta2 = group["betas"]
    gradient = gradient.to(first.dtype)
    first.lerp_(gradient, 1.0 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
    step = float(state["step"])
    root = (second / (1.0 - beta2**step)).sqrt_().add_(group["eps"])
    parameter.sub_((group["lr"] / (1.0 - beta1**step)) * first / root)


def buffer(parameter: Tensor, state: dict[str, Any], name: str) -> Tensor:
    """A state tensor of the parameter's shape, fp32 or wider, zero at first."""
    if name not in state:
        state[name] = torch.zeros_like(parameter, dtype=_wide(parameter))
    found: Tensor = state[name]
    return found


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)
