"""Delta-rule gradient descent for linear layers: W <- W (I - eta' X) - eta' grad, X the mean of x x^T / |x|^2 over inputs.

eta' = lr / (1 + lr), the exact step of the proximal problem for one input of norm 1 (Sherman-Morrison). The rule needs the
layer's inputs, which no optimizer sees: `attach` puts a hook on every linear layer whose weight is in a "matrix" group.
Unusual: without `attach`, or after a backward pass without a forward one, `step` refuses instead of silently becoming plain
gradient descent. Not a value of `optim.optimizer.kind`: hooks and ZeRO's flat weights do not meet.
Source: arXiv 2512.24695 equations 29 and 57.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.optim.matrix_rule import MatrixRuleOptimizer
from hsmn_dist.optim.param_groups import MATRIX_RULE


class DeltaGradientDescent(MatrixRuleOptimizer):
    """See the module's docstring.

    Args:
        params: parameters or groups.
        lr: rate eta.
        **defaults: weight_decay, betas, eps (AdamW of the other parameters).
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-2, **defaults: Any) -> None:
        super().__init__(params, {"lr": lr, **defaults})
        self._inputs: dict[Tensor, tuple[Tensor, int]] = {}

    def attach(self, model: nn.Module) -> None:
        """Listen to the inputs of the model's linear layers (training passes only)."""
        wanted = {id(p) for g in self.param_groups if g["rule"] == MATRIX_RULE for p in g["params"]}
        for module in model.modules():
            if isinstance(module, nn.Linear) and id(module.weight) in wanted:
                module.register_forward_pre_hook(self._collect)

    def _collect(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        assert isinstance(module, nn.Linear)
        x = inputs[0].detach().reshape(-1, module.in_features)
        x = nn.functional.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
        moment, count = self._inputs.get(module.weight, (torch.zeros((), dtype=x.dtype, device=x.device), 0))
        self._inputs[module.weight] = moment + x.mT @ x, count + len(x)

    def update_matrix(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One step; the inputs collected since the last one are used up."""
        if parameter not in self._inputs:
            raise ModelError(
                f"no inputs for a weight of shape {tuple(parameter.shape)}",
                allowed="linear layers whose forward ran in training mode since the last step",
                action="call optimizer.attach(model) before training",
            )
        moment, count = self._inputs.pop(parameter)
        rate = group["lr"] / (1.0 + group["lr"])
        erased = parameter.to(moment.dtype) @ moment / max(count, 1)
        parameter.sub_((rate * (erased + gradient.to(moment.dtype))).to(parameter.dtype))
