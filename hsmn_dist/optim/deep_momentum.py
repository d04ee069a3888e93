"""Momenta as associative memories: preconditioned, delta rule, and a small MLP (DMGD).

    preconditioned (equation 47)  m <- beta m - P g;                 W <- W + lr m,   P = 1 / (sqrt(v) + eps) or 1
    delta          (equation 49)  m <- m (beta I - u^T u) - P g;     W <- W + lr m,   u = g / |g|
    dmgd           (equation 50)  phi <- beta phi - r grad_phi <m_phi(u), u>;   W <- W + 0.2 lr m_phi(u)

Decided where the paper is silent or wrong (hope.md section 4): for a matrix g [o, d] the delta factor stands on the right
(g^T g is [d, d]), the only reading whose shapes fit; it has no step size, so the gradient in it has norm 1. DMGD's memory
is m_phi(u) = tanh(u W2^T) W1 on the rows of the normalised gradient (its columns where they are fewer), one hidden unit a
row, so its weights have the parameter's shape; the inner loss is the dot product with u itself, whose descent direction is
the descent direction, only W1 fades with beta (a fading W2 would stop reading), and the output's root mean square is held
to 1. Steps are 0.2 lr in root mean square at most, as AdamW's
typically are. Non-matrix parameters fall to AdamW. Source: arXiv 2512.24695 section 4.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from hsmn_dist.optim.matrix_rule import MatrixRuleOptimizer, buffer

SMALLEST = 1e-30


class PreconditionedMomentum(MatrixRuleOptimizer):
    """Equation 47, and 49 with `uses_delta`.

    Args:
        params: parameters or groups.
        lr: rate.
        momentum: beta.
        preconditioner: adam (P = 1 / (sqrt(v) + eps), v with bias correction) or identity.
        uses_delta: the factor beta I - u^T u instead of beta.
        **defaults: weight_decay, betas (the second is v's decay), eps.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.9,
        preconditioner: Literal["adam", "identity"] = "adam",
        uses_delta: bool = False,
        **defaults: Any,
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "preconditioner": preconditioner, "uses_delta": uses_delta}
        super().__init__(params, {**options, **defaults})

    def update_matrix(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One step."""
        memory = buffer(parameter, state, "memory")
        value = gradient
        if group["preconditioner"] == "adam":
            beta2 = group["betas"][1]
            second = buffer(parameter, state, "second").mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
            value = gradient / ((second / (1.0 - beta2 ** float(state["step"]))).sqrt() + group["eps"])
            # A running sum of unit steps would be 1 / (1 - beta) times AdamW's.
            value = value * (1.0 - group["momentum"])
        if group["uses_delta"]:
            unit = gradient / gradient.norm().clamp(min=SMALLEST)
            memory.copy_(group["momentum"] * memory - (memory @ unit.mT) @ unit)
        else:
            memory.mul_(group["momentum"])
        memory.sub_(value)
        parameter.add_(memory, alpha=group["lr"])


class DeepMomentum(MatrixRuleOptimizer):
    """DMGD: the momentum is an MLP that learns the gradient stream.

    Args:
        params: parameters or groups.
        lr: rate.
        momentum: beta, retention of the memory's own weights.
        memory_rate: r.
        **defaults: weight_decay, betas, eps (AdamW).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.9,
        memory_rate: float = 0.1,
        **defaults: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "memory_rate": memory_rate, **defaults})

    def update_matrix(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One step: teach the memory this gradient, then ask it."""
        if "read" not in state:
            # The same on every rank and in every run: a fixed generator, never the global one.
            generator = torch.Generator().manual_seed(0)
            drawn = torch.randn(parameter.shape, generator=generator).to(gradient)
            state["read"] = drawn * min(parameter.shape) ** -0.5
        read, write = state["read"], buffer(parameter, state, "write")
        is_tall = parameter.shape[0] > parameter.shape[1]
        largest = gradient.abs().max().clamp(min=torch.finfo(gradient.dtype).tiny)
        scaled = gradient / largest
        unit = scaled / scaled.square().mean().sqrt().clamp(min=SMALLEST)
        if is_tall:
            unit = unit.mT
        inner, outer = (read.mT, write.mT) if is_tall else (read, write)  # [r, c], hidden units x columns
        width = unit.shape[1]
        hidden = torch.tanh(unit @ inner.mT * width**-0.5)  # [r, r]
        # Inner loss: mean over rows of <m(u), u> / width.
        count = unit.numel()
        outer_gradient = hidden.mT @ unit * (unit.shape[0] / count)
        lifted = (unit @ outer.mT) * (1.0 - hidden * hidden) * (width**-0.5 * unit.shape[0] / count)
        inner_gradient = lifted.mT @ unit
        rate, beta = group["memory_rate"], group["momentum"]
        new_inner = inner - rate * inner_gradient
        new_outer = beta * outer - rate * outer_gradient
        out = torch.tanh(unit @ new_inner.mT * width**-0.5) @ new_outer
        step = out / out.square().mean().sqrt().clamp(min=1.0)
        read.copy_(new_inner.mT if is_tall else new_inner)
        write.copy_(new_outer.mT if is_tall else new_outer)
        parameter.add_(step.mT if is_tall else step, alpha=0.2 * group["lr"])
