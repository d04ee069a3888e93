"""From the optimizer section to a torch optimizer; the rate is set by the caller before every step.

Unusual: every rule runs with one learning rate over all groups (a group's `rate_scale` aside), because the matrix rules match the size of AdamW's steps
(0.2 * sqrt(max(rows, columns)), Liu et al. 2025, arXiv 2502.16982).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from hsmn_dist.config.optim import AdamConfig, DeepMomentumConfig, M3Config, MuonConfig, OptimConfig
from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.foundation.param_role import ParamRole, ParamUpdate
from hsmn_dist.optim.deep_momentum import DeepMomentum, PreconditionedMomentum
from hsmn_dist.optim.m3 import M3
from hsmn_dist.optim.mixed import MixedOptimizer
from hsmn_dist.optim.param_groups import MATRIX_RULE, build_groups
from hsmn_dist.optim.periodic import PeriodicAdamW


def build_optimizer(
    config: OptimConfig,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    roles: Mapping[str, ParamRole],
    updates: Mapping[str, ParamUpdate] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer that `config` names, over every trainable parameter exactly once.

    Args:
        config: the optimizer section.
        named_parameters: names and parameters of the whole model.
        roles: `LanguageModel.parameter_roles()`.
        updates: period and rate by parameter name (`LanguageModel.parameter_updates()`); periods with AdamW alone.

    Raises:
        ModelError: a parameter that cannot be placed, or periods with a rule that has none.
    """
    settings = config.optimizer
    is_adam = isinstance(settings, AdamConfig)
    groups = build_groups(
        named_parameters, roles, weight_decay=settings.weight_decay, uses_matrix_rule=not is_adam, updates=updates
    )
    has_periods = any(group["period_steps"] > 1 for group in groups)
    if isinstance(settings, AdamConfig):
        # With decay 0 AdamW and Adam are the same rule.
        return (PeriodicAdamW if has_periods else torch.optim.AdamW)(groups, **_adam_options(settings))
    if has_periods:
        raise ModelError(
            f"levels with update periods under optim.optimizer.kind {settings.kind}",
            allowed="periods (a CMS with cadence optimizer) with kind adam",
            action="set optim.optimizer.kind to adam, or the CMS's cadence to tokens",
        )
    if isinstance(settings, MuonConfig):
        return _build_muon(settings, groups)
    if isinstance(settings, M3Config):
        return M3(
            groups,
            mode=settings.mode,
            momentum=(settings.fast_momentum, settings.slow_momentum),
            second_moment=settings.second_moment,
            slow_every_steps=settings.slow_every_steps,
            slow_weight=settings.slow_weight,
            num_newton_schulz_steps=settings.num_newton_schulz_steps,
            **_adam_options(settings),
        )
    return _build_deep_momentum(settings, groups)


def _adam_options(settings: AdamConfig | MuonConfig | M3Config | DeepMomentumConfig) -> dict[str, Any]:
    return {
        "lr": settings.learning_rate,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }


def _build_muon(settings: MuonConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    matrices = [group for group in groups if group["rule"] == MATRIX_RULE]
    others = [group for group in groups if group["rule"] != MATRIX_RULE]
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        parts.append(
            torch.optim.Muon(
                matrices,
                lr=settings.learning_rate,
                weight_decay=settings.weight_decay,
                momentum=settings.momentum,
                nesterov=settings.uses_nesterov,
                ns_steps=settings.num_newton_schulz_steps,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    if others:
        parts.append(torch.optim.AdamW(others, **_adam_options(settings)))
    return MixedOptimizer(parts)


def _build_deep_momentum(settings: DeepMomentumConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    options = _adam_options(settings)
    if settings.variant == "dmgd":
        return DeepMomentum(groups, momentum=settings.momentum, memory_rate=settings.memory_rate, **options)
    return PreconditionedMomentum(
        groups,
        momentum=settings.momentum,
        preconditioner=settings.preconditioner,
        uses_delta=settings.variant == "delta",
        **options,
    )
