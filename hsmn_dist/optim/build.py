"""From the optimizer section to a torch optimizer; the rate is set by the caller before every step.

Unusual: every rule runs with one learning rate over all groups, because the matrix rules match the size of AdamW's steps
(0.2 * sqrt(max(rows, columns)), Liu et al. 2025, arXiv 2502.16982).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from hsmn_dist.config.optim import AdamConfig, OptimConfig
from hsmn_dist.foundation.param_role import ParamRole
from hsmn_dist.optim.param_groups import build_groups
from hsmn_dist.optim.periodic import PeriodicAdamW


def build_optimizer(
    config: OptimConfig,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    roles: Mapping[str, ParamRole],
    periods: Mapping[str, int] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer that `config` names, over every trainable parameter exactly once.

    Args:
        config: the optimizer section.
        named_parameters: names and parameters of the whole model.
        roles: `LanguageModel.parameter_roles()`.
        periods: optimizer steps between two updates by parameter name (`HopeModel.parameter_periods()`); elementwise
            rules only.

    Raises:
        ModelError: a parameter that cannot be placed, or periods with a rule that has none.
    """
    return _build_adam(config.optimizer, named_parameters, roles, periods)


def _build_adam(
    settings: AdamConfig,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    roles: Mapping[str, ParamRole],
    periods: Mapping[str, int] | None,
) -> torch.optim.Optimizer:
    groups = build_groups(named_parameters, roles, weight_decay=settings.weight_decay, periods=periods)
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    if any(group["period_steps"] > 1 for group in groups):
        return PeriodicAdamW(groups, **options)
    # With decay 0 AdamW and Adam are the same rule.
    return torch.optim.AdamW(groups, **options)
