"""From roles to parameter groups: every trainable parameter is placed exactly once, or an error says which was not.

Unusual: nothing is guessed from shapes or names (under ZeRO-3 shapes are gone, and names lied to others: DeepSpeed pull
requests 8438 and 8442). Groups may carry a period and a rate, which is how a continuum memory with
`cadence: optimizer` meets ZeRO.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.foundation.param_role import EVERY_STEP, ParamRole, ParamUpdate

MATRIX_RULE = "matrix"
ELEMENTWISE_RULE = "elementwise"


def build_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    roles: Mapping[str, ParamRole],
    *,
    weight_decay: float,
    uses_matrix_rule: bool = False,
    updates: Mapping[str, ParamUpdate] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups, none of them empty, in a fixed order.

    Args:
        named_parameters: names and parameters of the whole model; frozen ones (requires_grad False) are left out.
        roles: role of every name, and of nothing else.
        weight_decay: decoupled decay of matrices, token tables and heads; vectors (biases, norms) get 0.
        uses_matrix_rule: put two-dimensional parameters of role MATRIX into groups of rule "matrix"; else all groups
            are "elementwise". A MATRIX parameter of another rank (stacked per-head memories, convolutions) stays
            elementwise.
        updates: period and rate by name; every step, at the optimizer's rate, for names that are not given.

    Returns:
        Groups with the keys params, weight_decay, rule, period_steps, rate_scale and name.

    Raises:
        ModelError: a parameter without role, a role or update without parameter, or a tensor that comes twice.
    """
    parameters = list(named_parameters)
    updates = dict(updates or {})
    _check_placement([name for name, _ in parameters], [p for _, p in parameters], roles, updates)
    groups: dict[tuple[str, bool, ParamUpdate], dict[str, Any]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        is_matrix = uses_matrix_rule and roles[name] is ParamRole.MATRIX and _rank(parameter) == 2
        rule = MATRIX_RULE if is_matrix else ELEMENTWISE_RULE
        decays = roles[name] is not ParamRole.VECTOR
        update = updates.get(name, EVERY_STEP)
        if (rule, decays, update) not in groups:
            groups[rule, decays, update] = {
                "params": [],
                "weight_decay": weight_decay if decays else 0.0,
                "rule": rule,
                **update._asdict(),
                "name": f"{rule}_{'decay' if decays else 'no_decay'}_period_{update.period_steps}_rate_{update.rate_scale:g}",
            }
        groups[rule, decays, update]["params"].append(parameter)
    if not groups:
        raise ModelError(
            "a model without a trainable parameter",
            allowed="at least one parameter with requires_grad",
            action="unfreeze the part that should learn",
        )
    return [groups[key] for key in sorted(groups)]


def _rank(parameter: nn.Parameter) -> int:
    # ZeRO-3 empties the tensor and keeps the shape aside.
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _check_placement(
    names: list[str], parameters: list[nn.Parameter], roles: Mapping[str, ParamRole], updates: Mapping[str, ParamUpdate]
) -> None:
    missing = [name for name in names if name not in roles]
    unknown = sorted(set(roles) - set(names))
    if missing or unknown:
        raise ModelError(
            f"parameters without a role: {missing[:5]}; roles without a parameter: {unknown[:5]}",
            allowed="one role per parameter, by the name that named_parameters() gives",
            action="correct the model's parameter_roles()",
        )
    if len({id(p) for p in parameters}) != len(parameters) or len(set(names)) != len(names):
        raise ModelError(
            "the same parameter twice in named_parameters",
            allowed="every parameter exactly once; a tied one under one name",
            action="pass model.named_parameters() as it is (it removes duplicates)",
        )
    wrong = sorted(
        name for name, own in updates.items() if name not in set(names) or own.period_steps < 1 or own.rate_scale < 0
    )
    if wrong:
        raise ModelError(
            f"update periods or rates for {wrong[:5]}",
            allowed="periods of 1 step or more and rates of 0 or more, for parameters of the model",
            action="correct the model's parameter_updates()",
        )
