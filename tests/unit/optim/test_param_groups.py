"""Every parameter is placed exactly once, or the error names it."""

import pytest
import torch
from torch import nn

from hsmn_dist.config.optim import AdamConfig, OptimConfig
from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.foundation.param_role import ParamRole, ParamUpdate
from hsmn_dist.optim.build import build_optimizer
from hsmn_dist.optim.param_groups import build_groups


def _model():
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 7))


ROLES = {
    "0.weight": ParamRole.EMBEDDING,
    "1.weight": ParamRole.MATRIX,
    "1.bias": ParamRole.VECTOR,
    "2.weight": ParamRole.VECTOR,
    "2.bias": ParamRole.VECTOR,
    "3.weight": ParamRole.HEAD,
    "3.bias": ParamRole.VECTOR,
}


def test_groups_hold_every_parameter_once_and_vectors_do_not_decay():
    model = _model()
    groups = build_groups(model.named_parameters(), ROLES, weight_decay=0.1, uses_matrix_rule=True)
    placed = [id(p) for g in groups for p in g["params"]]
    assert sorted(placed) == sorted(id(p) for p in model.parameters())
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    rule = {id(p): g["rule"] for g in groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if ROLES[name] is ParamRole.VECTOR else 0.1)
        assert rule[id(parameter)] == ("matrix" if ROLES[name] is ParamRole.MATRIX else "elementwise")


def test_frozen_parameters_are_left_out():
    model = _model()
    model[1].requires_grad_(False)
    groups = build_groups(model.named_parameters(), ROLES, weight_decay=0.0)
    assert sum(len(g["params"]) for g in groups) == 5


@pytest.mark.parametrize("change", ["missing", "unknown", "twice", "nobody", "period", "rate"])
def test_a_parameter_that_cannot_be_placed_once_is_an_error(change):
    model = _model()
    named, roles, updates = list(model.named_parameters()), dict(ROLES), {}
    if change == "missing":
        del roles["1.bias"]
    elif change == "unknown":
        roles["9.weight"] = ParamRole.MATRIX
    elif change == "twice":
        named.append(named[0])
    elif change == "nobody":
        updates["nobody"] = ParamUpdate(4)
    else:
        updates["1.weight"] = ParamUpdate(0) if change == "period" else ParamUpdate(1, -1.0)
    with pytest.raises(ModelError):
        build_groups(named, roles, weight_decay=0.0, updates=updates)


def test_adam_step_equals_the_written_equations():
    torch.manual_seed(0)
    model = _model().double()
    settings = AdamConfig(learning_rate=0.01, weight_decay=0.1)
    optimizer = build_optimizer(OptimConfig(optimizer=settings), model.named_parameters(), ROLES)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    optimizer.step()
    for name, p in model.named_parameters():
        decay = 0.0 if ROLES[name] is ParamRole.VECTOR else 0.1
        g = gradients[name]
        expected = before[name] * (1 - 0.01 * decay) - 0.01 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-10, atol=1e-12)


def test_periodic_group_is_constant_between_updates_and_then_takes_the_summed_gradient():
    torch.manual_seed(1)
    model, twin = _model().double(), _model().double()
    twin.load_state_dict(model.state_dict())
    config = OptimConfig(optimizer=AdamConfig(learning_rate=0.01, weight_decay=0.1))
    optimizer = build_optimizer(config, model.named_parameters(), ROLES, updates={"1.weight": ParamUpdate(3)})
    single = build_optimizer(config, twin.named_parameters(), ROLES)
    total = torch.zeros_like(model[1].weight)
    for step in range(1, 7):
        start = model[1].weight.detach().clone()
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        total += model[1].weight.grad
        optimizer.step()
        if step % 3:
            assert torch.equal(model[1].weight.detach(), start)
        else:
            twin.zero_grad()
            twin[1].weight.grad = total.clone()
            single.step()
            torch.testing.assert_close(model[1].weight, twin[1].weight, rtol=1e-12, atol=1e-12)
            total.zero_()


def test_periodic_state_survives_save_and_load_in_the_middle_of_a_period_bitwise(tmp_path):
    def run(interrupted):
        torch.manual_seed(2)
        model = _model()
        config = OptimConfig(optimizer=AdamConfig(learning_rate=0.01))
        optimizer = build_optimizer(config, model.named_parameters(), ROLES, updates={"1.weight": ParamUpdate(4)})
        for step in range(8):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
            if interrupted and step == 4:
                torch.save(optimizer.state_dict(), tmp_path / "state.pt")
                optimizer = build_optimizer(
                    config, model.named_parameters(), ROLES, updates={"1.weight": ParamUpdate(4)}
                )
                optimizer.load_state_dict(torch.load(tmp_path / "state.pt"))
        return [p.detach().clone() for p in model.parameters()]

    for left, right in zip(run(False), run(True), strict=True):
        assert torch.equal(left, right)
