"""Optimizers against the written equations, one matrix at a time, in float64; scale, timing, saved state."""

import copy

import pytest
import torch
from torch import nn

from hsmn_dist.config.optim import AdamConfig, DeepMomentumConfig, M3Config, MuonConfig, OptimConfig
from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.foundation.param_role import ParamRole, ParamUpdate
from hsmn_dist.optim.build import build_optimizer
from hsmn_dist.optim.deep_momentum import DeepMomentum, PreconditionedMomentum
from hsmn_dist.optim.delta_descent import DeltaGradientDescent
from hsmn_dist.optim.m3 import M3
from hsmn_dist.optim.newton_schulz import orthogonalize


def _gradients(shape, steps, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


def _run(optimizer_of, shape, gradients):
    weight = nn.Parameter(torch.ones(*shape, dtype=torch.float64))
    optimizer = optimizer_of([weight])
    path = []
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        path.append(weight.detach().clone())
    return path


def _close(found, expected, tolerance=1e-10):
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def test_m3_in_paper_mode_is_algorithm_1_to_the_letter():
    gradients = _gradients((3, 5), 7)
    found = _run(
        lambda p: M3(
            p, lr=0.1, mode="paper", momentum=(0.9, 0.7), second_moment=0.05, slow_every_steps=3, slow_weight=0.5
        ),
        (3, 5),
        gradients,
    )
    weight, m1, m2, v = (torch.zeros(3, 5, dtype=torch.float64) for _ in range(4))
    weight, o2, expected = weight + 1.0, torch.zeros(3, 5, dtype=torch.float64), []
    for t, g in enumerate(gradients):
        if t > 0 and t % 3 == 0:  # a new slow chunk begins: M2 takes the sum over the last one
            m2 = m2 + 0.7 * sum(gradients[t - 3 : t])
            o2 = orthogonalize(m2, 5)
        m1 = m1 + 0.9 * g
        v = v + 0.05 * g * g
        weight = weight - 0.1 * (orthogonalize(m1, 5) + 0.5 * o2) / (v.sqrt() + 1e-8)
        expected.append(weight.clone())
    _close(found, expected)


def test_m3_normalised_equals_its_equations():
    gradients = _gradients((4, 3), 5)
    found = _run(lambda p: M3(p, lr=0.1, momentum=(0.9, 0.7), slow_every_steps=2, slow_weight=0.5), (4, 3), gradients)
    weight, m1, m2, o2 = (torch.zeros(4, 3, dtype=torch.float64) for _ in range(4))
    weight, expected = weight + 1.0, []
    for t, g in enumerate(gradients):
        m1 = 0.9 * m1 + 0.1 * g
        weight = weight - 0.1 * 0.2 * 2.0 * (orthogonalize(m1) + 0.5 * o2) / 1.25**0.5
        if t % 2 == 1:
            m2 = 0.7 * m2 + 0.3 * (gradients[t] + gradients[t - 1]) / 2
            o2 = orthogonalize(m2)
        expected.append(weight.clone())
    _close(found, expected)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_m3_normalised_does_not_depend_on_the_gradients_scale(scale):
    def run(factor):
        return _run(lambda p: M3(p, lr=0.1, slow_every_steps=2), (4, 6), _gradients((4, 6), 5, scale=factor))

    _close(run(scale), run(1.0), 1e-8)


def test_m3_uses_a_new_slow_direction_from_the_next_window_on_only():
    gradients = _gradients((3, 3), 6)

    def run(weight):
        return _run(lambda p: M3(p, lr=0.1, slow_every_steps=3, slow_weight=weight), (3, 3), gradients)

    fast, both = run(0.0), run(0.5)
    scaled = [1.0 + (w - 1.0) * 1.25**0.5 for w in both[:3]]
    _close(scaled, fast[:3])
    assert (both[3] - both[2] - (fast[3] - fast[2]) / 1.25**0.5).abs().max() > 1e-3


@pytest.mark.parametrize("uses_delta", [False, True])
def test_preconditioned_and_delta_momentum_equal_equations_47_and_49(uses_delta):
    gradients = _gradients((3, 4), 4)
    found = _run(
        lambda p: PreconditionedMomentum(p, lr=0.1, momentum=0.8, preconditioner="identity", uses_delta=uses_delta),
        (3, 4),
        gradients,
    )
    weight = torch.ones(3, 4, dtype=torch.float64)
    memory, expected = torch.zeros_like(weight), []
    for g in gradients:
        right = 0.8 * torch.eye(4, dtype=torch.float64)
        if uses_delta:
            u = g / g.norm()
            right = right - u.mT @ u
        memory = memory @ right - g
        weight = weight + 0.1 * memory
        expected.append(weight.clone())
    _close(found, expected)


def test_preconditioned_momentum_without_momentum_is_adam_without_a_first_moment():
    gradients = _gradients((3, 4), 5)
    found = _run(lambda p: PreconditionedMomentum(p, lr=0.1, momentum=0.0, betas=(0.9, 0.99)), (3, 4), gradients)
    twin = nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
    adam = torch.optim.Adam([twin], lr=0.1, betas=(0.0, 0.99))
    expected = []
    for g in gradients:
        twin.grad = g.clone()
        adam.step()
        expected.append(twin.detach().clone())
    _close(found, expected)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_the_deep_momentum_memory_takes_the_autograd_step_of_its_inner_loss(shape):
    gradients = _gradients(shape, 3)
    weight = nn.Parameter(torch.ones(*shape, dtype=torch.float64))
    optimizer = DeepMomentum([weight], lr=0.1, momentum=0.8, memory_rate=0.3)
    inner = outer = None
    for g in gradients:
        before = weight.detach().clone()
        weight.grad = g.clone()
        optimizer.step()
        u = g / g.square().mean().sqrt()
        u = u.mT if shape[0] > shape[1] else u
        state = optimizer.state[weight]
        if inner is None:
            drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double() * min(shape) ** -0.5
            inner = drawn.mT if shape[0] > shape[1] else drawn
            outer = torch.zeros_like(inner)
        inner, outer = inner.clone().requires_grad_(), outer.clone().requires_grad_()
        loss = ((torch.tanh(u @ inner.mT * u.shape[1] ** -0.5) @ outer) * u).sum() / u.shape[1]
        d_inner, d_outer = torch.autograd.grad(loss, (inner, outer))
        inner, outer = (inner - 0.3 * d_inner).detach(), (0.8 * outer - 0.3 * d_outer).detach()
        out = torch.tanh(u @ inner.mT * u.shape[1] ** -0.5) @ outer
        out = out / out.square().mean().sqrt().clamp(min=1.0)
        stored = (state["read"], state["write"])
        _close([s.mT if shape[0] > shape[1] else s for s in stored], [inner, outer])
        _close([weight.detach() - before], [0.02 * (out.mT if shape[0] > shape[1] else out)])
        # It descends: the step opposes the gradient.
        assert ((weight.detach() - before) * g).sum() < 0


def test_delta_rule_descent_equals_equation_57_for_a_linear_layer():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    optimizer = DeltaGradientDescent(layer.parameters(), lr=0.5)
    optimizer.attach(layer)
    x, target = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    weight = layer.weight.detach().clone()
    nn.functional.mse_loss(layer(x), target).backward()
    gradient = layer.weight.grad.clone()
    optimizer.step()
    unit = nn.functional.normalize(x, dim=-1)
    rate = 0.5 / 1.5
    expected = weight @ (torch.eye(4, dtype=torch.float64) - rate * unit.mT @ unit / 6) - rate * gradient
    _close([layer.weight.detach()], [expected])
    layer.weight.grad = gradient
    with pytest.raises(ModelError, match="attach"):
        optimizer.step()


@pytest.mark.parametrize("shape", [(8, 8), (8, 32), (32, 8), (30, 33)])
def test_newton_schulz_singular_values_are_near_one_and_wide_equals_tall_transposed(shape):
    matrix = _gradients(shape, 1, seed=3)[0]
    # A random square matrix has some singular values near 0, which need more steps.
    values = torch.linalg.svdvals(orthogonalize(matrix, 10 if max(shape) - min(shape) < 8 else 5))
    assert float(values.min()) > 0.65 and float(values.max()) < 1.3
    _close([orthogonalize(matrix).mT], [orthogonalize(matrix.mT)])
    exact = orthogonalize(matrix, 40, "cubic")
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    _close([exact], [u @ v], 1e-6)


def test_newton_schulz_takes_the_smallest_and_largest_numbers_and_zero():
    matrix = _gradients((4, 6), 1)[0].float()
    for scale in (1e-30, 1e30):
        _close([orthogonalize(matrix * scale)], [orthogonalize(matrix)], 1e-4)
    assert not orthogonalize(torch.zeros(3, 4)).any()


ROLES = {
    "0.weight": ParamRole.EMBEDDING,
    "1.weight": ParamRole.MATRIX,
    "1.bias": ParamRole.VECTOR,
    "2.weight": ParamRole.HEAD,
    "2.bias": ParamRole.VECTOR,
}
SETTINGS = [
    AdamConfig(learning_rate=0.01, weight_decay=0.1),
    MuonConfig(learning_rate=0.01),
    M3Config(learning_rate=0.01, slow_every_steps=3),
    M3Config(learning_rate=0.01, slow_every_steps=3, mode="paper"),
    DeepMomentumConfig(learning_rate=0.01, variant="preconditioned"),
    DeepMomentumConfig(learning_rate=0.01, variant="delta"),
    DeepMomentumConfig(learning_rate=0.01, variant="dmgd"),
]
every_setting = pytest.mark.parametrize(
    "settings", SETTINGS, ids=lambda s: f"{s.kind}-{getattr(s, 'variant', getattr(s, 'mode', ''))}"
)


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 5), nn.Linear(5, 7))


def _train(model, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(0, 7, (16,), generator=generator)
        loss = nn.functional.cross_entropy(model(tokens), (tokens + 1) % 7)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@every_setting
def test_every_configured_optimizer_learns_and_its_state_survives_save_and_load_bitwise(settings, tmp_path):
    model = _model()
    config = OptimConfig(optimizer=settings)
    optimizer = build_optimizer(config, model.named_parameters(), ROLES)
    losses = _train(model, optimizer, 40, 1)
    assert losses[-1] < losses[0]
    twin = copy.deepcopy(model)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    restored = build_optimizer(config, twin.named_parameters(), ROLES)
    restored.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert _train(model, optimizer, 5, 2) == _train(twin, restored, 5, 2)
    for left, right in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(left, right)


@every_setting
def test_state_tensors_have_their_parameters_shape_or_are_scalars(settings):
    model = _model()
    optimizer = build_optimizer(OptimConfig(optimizer=settings), model.named_parameters(), ROLES)
    _train(model, optimizer, 2, 1)
    placed = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in placed} == {id(p) for p in model.parameters()} and len(placed) == 5
    for parameter in placed:
        assert optimizer.state[parameter]
        for entry in optimizer.state[parameter].values():
            assert entry.dim() == 0 or entry.shape == parameter.shape


@pytest.mark.parametrize("settings", SETTINGS[1:], ids=lambda s: s.kind)
def test_the_rate_is_set_through_the_groups_and_only_the_hidden_matrix_has_the_matrix_rule(settings):
    model = _model()
    optimizer = build_optimizer(OptimConfig(optimizer=settings), model.named_parameters(), ROLES)
    matrices = [p for g in optimizer.param_groups if g["rule"] == "matrix" for p in g["params"]]
    assert [id(p) for p in matrices] == [id(model[1].weight)]
    before = [p.detach().clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    _train(model, optimizer, 2, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_flat_pieces_and_periods_are_refused_by_matrix_rules():
    with pytest.raises(ModelError, match="ZeRO"):
        M3([{"params": [nn.Parameter(torch.zeros(6))], "rule": "matrix"}])
    with pytest.raises(ModelError, match="periods"):
        build_optimizer(
            OptimConfig(optimizer=M3Config()), _model().named_parameters(), ROLES, {"1.weight": ParamUpdate(4)}
        )
