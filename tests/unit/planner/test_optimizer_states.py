from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hsmn_dist.config.optim import OptimConfig
from hsmn_dist.distributed.matrix_owner import choose_owners, matrix_cost
from hsmn_dist.models.build import build_model
from hsmn_dist.models.contract import LanguageModel
from hsmn_dist.optim.build import build_optimizer
from hsmn_dist.planner.optimizer_states import deal_matrices, optimizer_load
from hsmn_dist.planner.parameters import ParameterCount, count_parameters
from tests.support.planner import MODELS

RULES: dict[str, dict[str, Any]] = {
    "adam": {"kind": "adam"},
    "muon": {"kind": "muon"},
    "m3": {"kind": "m3", "slow_every_steps": 2},
    "m3_paper": {"kind": "m3", "mode": "paper", "slow_every_steps": 2},
    "preconditioned": {"kind": "deep_momentum", "variant": "preconditioned"},
    "identity": {"kind": "deep_momentum", "variant": "preconditioned", "preconditioner": "identity"},
    "delta": {"kind": "deep_momentum", "variant": "delta"},
    "dmgd": {"kind": "deep_momentum", "variant": "dmgd"},
}


def stepped(rule: str, name: str, num_steps: int) -> tuple[torch.optim.Optimizer, float]:
    """The real optimizer over a tiny model after some steps, and the FLOPs of its products as torch counts them."""
    torch.manual_seed(0)
    model: LanguageModel = build_model(MODELS[name])
    updates = model.parameter_updates() if rule == "adam" else None
    config = OptimConfig.model_validate({"optimizer": RULES[rule]})
    optimizer = build_optimizer(config, model.named_parameters(), model.parameter_roles(), updates)
    with FlopCounterMode(display=False) as counter:
        for _ in range(num_steps):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
    return optimizer, float(counter.get_total_flops())


@pytest.mark.parametrize("name", ["hsmn", "hope"])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_state_bytes_equal_those_of_the_real_optimizer(rule: str, name: str) -> None:
    optimizer, _ = stepped(rule, name, 1)
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim() > 0]
    held = sum(value.numel() * value.element_size() for value in states)
    config = OptimConfig.model_validate({"optimizer": RULES[rule]})
    load = optimizer_load(config.optimizer, count_parameters(MODELS[name]), 1, is_sharded=False)
    assert load.state_bytes == load.rank_bytes == held


def test_levels_that_are_updated_by_periods_keep_the_sum_of_their_gradients() -> None:
    optimizer, _ = stepped("adam", "hope_optimizer_chain", 1)
    held = sum(v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values() if v.dim() > 0)
    parameters = count_parameters(MODELS["hope_optimizer_chain"])
    assert parameters.periodic > 0
    assert optimizer_load(OptimConfig().optimizer, parameters, 1, is_sharded=False).state_bytes == held


@pytest.mark.parametrize("rule", sorted(RULES))
def test_flops_of_a_step_equal_what_torch_counts(rule: str) -> None:
    _, counted = stepped(rule, "hsmn", 2)
    config = OptimConfig.model_validate({"optimizer": RULES[rule]})
    load = optimizer_load(config.optimizer, count_parameters(MODELS["hsmn"]), 1, is_sharded=False)
    assert load.flops == pytest.approx(counted / 2, rel=1e-12)


def test_matrices_are_dealt_as_the_engine_deals_them() -> None:
    for name in ("hsmn", "hope", "hope_matrix"):
        shapes = count_parameters(MODELS[name]).matrices
        for world_size in (1, 2, 3, 64):
            assert deal_matrices(shapes, world_size) == choose_owners([matrix_cost(s) for s in shapes], world_size)


def test_a_rank_never_holds_less_than_the_largest_matrix_that_somebody_owns() -> None:
    parameters = ParameterCount((600, 200, 30), {}, 1, 830, ((30, 20), (20, 10)))
    muon = OptimConfig.model_validate({"optimizer": {"kind": "muon"}}).optimizer
    loads = [optimizer_load(muon, parameters, ranks, is_sharded=True) for ranks in (1, 2, 1000)]
    assert [load.owned_elements for load in loads] == [800, 600, 600]
    # A whole fp32 copy and the momentum of what is owned, and Adam's two moments of a share of the 30 others.
    assert [load.rank_bytes for load in loads] == [4 * (2 * 800 + 60), 4 * (2 * 600 + 30), 4 * (2 * 600 + 1)]
    assert loads[1].exchanged_bytes(2) == 4 * (2 * 400 + 600)
    assert loads[0].exchanged_bytes(1) == 0
