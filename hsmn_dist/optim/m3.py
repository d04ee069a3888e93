"""M3, multi-scale momentum Muon: a fast momentum every step, a slow one every f steps, both orthogonalised.

    paper (Algorithm 1 of arXiv 2512.24695, to the letter):
        M1 += b1 g;  V += b2 g^2;  behind every f steps M2 += b3 (sum of their g), O2 = NS(M2) for the next window
        W -= lr (NS(M1) + a O2) / (sqrt(V) + eps)
    normalised (default):
        M1 = b1 M1 + (1 - b1) g;  behind every f steps M2 = b3 M2 + (1 - b3) (mean of their g), O2 = NS(M2)
        W -= lr 0.2 sqrt(max(rows, columns)) (NS(M1) + a O2) / sqrt(1 + a^2)

The letter's V never decays, and dividing an orthogonalised matrix by sqrt(V) makes the step proportional to 1 / |g|
(measured: root mean square of the first step over lr 5 at |g| 1e-1, 1,344 at 1e-5); hence the second form, whose update does
not depend on the gradient's scale. Non-matrix parameters fall to AdamW. State per matrix: 4 P (paper 5 P), fp32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor

from hsmn_dist.optim.matrix_rule import MatrixRuleOptimizer, buffer
from hsmn_dist.optim.newton_schulz import matched_scale, orthogonalize


class M3(MatrixRuleOptimizer):
    """See the module's docstring.

    Args:
        params: parameters or groups (`MatrixRuleOptimizer`).
        lr: rate.
        mode: normalised or paper.
        momentum: (b1, b3), fast and slow.
        second_moment: b2 of the paper's V.
        slow_every_steps: f.
        slow_weight: a.
        num_newton_schulz_steps: T.
        **defaults: weight_decay; betas and eps of AdamW (eps is the paper's too).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        mode: Literal["normalised", "paper"] = "normalised",
        momentum: tuple[float, float] = (0.95, 0.9),
        second_moment: float = 0.05,
        slow_every_steps: int = 10,
        slow_weight: float = 0.5,
        num_newton_schulz_steps: int = 5,
        **defaults: Any,
    ) -> None:
        options = {
            "lr": lr,
            "mode": mode,
            "momentum": momentum,
            "second_moment": second_moment,
            "slow_every_steps": slow_every_steps,
            "slow_weight": slow_weight,
            "num_newton_schulz_steps": num_newton_schulz_steps,
        }
        super().__init__(params, {**options, **defaults})

    def update_matrix(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One M3 step."""
        fast, window = buffer(parameter, state, "fast"), buffer(parameter, state, "window_sum")
        slow, slow_direction = buffer(parameter, state, "slow"), buffer(parameter, state, "slow_direction")
        beta_fast, beta_slow = group["momentum"]
        steps, weight = group["num_newton_schulz_steps"], group["slow_weight"]
        window.add_(gradient)
        if group["mode"] == "paper":
            fast.add_(gradient, alpha=beta_fast)
            second = buffer(parameter, state, "second").addcmul_(gradient, gradient, value=group["second_moment"])
            direction = orthogonalize(fast, steps).add_(slow_direction, alpha=weight)
            parameter.sub_(group["lr"] * direction / (second.sqrt() + group["eps"]))
        else:
            fast.lerp_(gradient, 1.0 - beta_fast)
            direction = orthogonalize(fast, steps).add_(slow_direction, alpha=weight)
            scale = matched_scale(parameter) / (1.0 + weight**2) ** 0.5
            parameter.sub_(group["lr"] * scale * direction)
        if int(state["step"]) % group["slow_every_steps"] == 0:
            if group["mode"] == "paper":
                slow.add_(window, alpha=beta_slow)
            else:
                slow.lerp_(window / group["slow_every_steps"], 1.0 - beta_slow)
            slow_direction.copy_(orthogonalize(slow, steps))
            window.zero_()
