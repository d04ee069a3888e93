"""The two-buffer penalty: invariants of continual.md section 7 that need no engine."""

from __future__ import annotations

import math

import pytest
import torch

from hsmn_dist.continual.ewc import EwcMemory, EwcPenalty, TaskRecord, merge_task, proximal_step
from hsmn_dist.foundation.errors import CheckpointError, ConfigError
from tests.support.param_shards import random_weights, shards_of

SHAPES = {"a.weight": (5, 3), "b": (7,), "scalar": ()}
RECORD = TaskRecord("first", num_examples=8)


def memory_of(weights, fishers, decay=1.0):
    """Memory after the tasks whose anchors are `weights[k]` and Fishers `fishers[k]`."""
    memory = EwcMemory.empty(shards_of(weights[0]))
    for anchor, fisher in zip(weights, fishers, strict=True):
        shards = shards_of(anchor)
        memory.add_task(shards, [fisher[s.name].view(-1) for s in shards], RECORD, decay)
    return memory


def with_zero_gradients(weights):
    for weight in weights.values():
        weight.requires_grad_()
        weight.grad = torch.zeros_like(weight)
    return weights


def positive(seed):
    return {name: value.square() for name, value in random_weights(seed, SHAPES).items()}


def test_value_and_gradient_are_zero_at_the_anchor_after_one_task() -> None:
    anchor = with_zero_gradients(random_weights(0, SHAPES))
    penalty = EwcPenalty(memory_of([anchor], [positive(1)]), 10.0)
    shards = shards_of(anchor)
    penalty.add_gradients(shards)
    assert float(penalty.local_value(shards)) == 0.0
    assert all(not s.gradient.any() for s in shards)


def test_strength_zero_changes_no_bit() -> None:
    theta = with_zero_gradients(random_weights(5, SHAPES, torch.float32))
    for weight in theta.values():
        weight.grad.normal_()
        weight.grad.view(-1)[0] = -0.0
    memory = memory_of([random_weights(0, SHAPES, torch.float32)], [positive(1)])
    before = {n: (w.detach().clone(), w.grad.clone()) for n, w in theta.items()}
    for application in ("coupled", "proximal"):
        penalty = EwcPenalty(memory, 0.0, application)
        penalty.add_gradients(shards_of(theta))
        assert penalty.after_step(shards_of(theta), 0.1) is False
        assert float(penalty.local_value(shards_of(theta))) == 0.0
    for name, weight in theta.items():
        assert torch.equal(weight.view(torch.int32), before[name][0].view(torch.int32))
        assert torch.equal(weight.grad.view(torch.int32), before[name][1].view(torch.int32))


def test_gradient_equals_autograd_of_the_value() -> None:
    anchors, fishers = [random_weights(k, SHAPES) for k in range(3)], [positive(k + 10) for k in range(3)]
    theta = with_zero_gradients(random_weights(9, SHAPES))
    penalty = EwcPenalty(memory_of(anchors, fishers), 3.0)
    penalty.add_gradients(shards_of(theta))
    value = sum(
        1.5 * (f[n] * (theta[n] - a[n]) ** 2).sum() for a, f in zip(anchors, fishers, strict=True) for n in SHAPES
    )
    expected = torch.autograd.grad(value, list(theta.values()))
    assert math.isclose(float(penalty.local_value(shards_of(theta))), value.item(), rel_tol=1e-12)
    for weight, gradient in zip(theta.values(), expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-12, atol=1e-12)


def test_each_component_has_its_own_strength() -> None:
    anchors, fishers = [random_weights(k, SHAPES) for k in range(2)], [positive(k + 10) for k in range(2)]
    theta = with_zero_gradients(random_weights(9, SHAPES))
    factors = {"a.weight": 2.0, "b": 0.0, "scalar": 1.0}
    shards = shards_of(theta, component=lambda name: "encoder" if name == "a.weight" else name)
    penalty = EwcPenalty(memory_of(anchors, fishers), 3.0, component_strength={"encoder": 2.0, "b": 0.0})
    penalty.add_gradients(shards)
    value = sum(
        1.5 * factors[n] * (f[n] * (theta[n] - a[n]) ** 2).sum()
        for a, f in zip(anchors, fishers, strict=True)
        for n in SHAPES
    )
    assert math.isclose(float(penalty.local_value(shards)), value.item(), rel_tol=1e-12)
    for weight, gradient in zip(theta.values(), torch.autograd.grad(value, list(theta.values())), strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-12, atol=1e-12)


def test_online_decay_forgets_old_precision_and_moves_the_anchor() -> None:
    anchors, fishers = [random_weights(k, SHAPES) for k in range(3)], [positive(k + 10) for k in range(3)]
    memory = memory_of(anchors, fishers, decay=0.5)
    for kept in memory.shards:
        f = [fisher[kept.name].view(-1) for fisher in fishers]
        torch.testing.assert_close(kept.precision, 0.25 * f[0] + 0.5 * f[1] + f[2], rtol=1e-12, atol=0)
        assert torch.equal(kept.centre, anchors[2][kept.name].view(-1))
        assert kept.residual == 0.0


def test_l2_keeps_the_last_weights_with_precision_one() -> None:
    first, second = random_weights(0, SHAPES), random_weights(1, SHAPES)
    memory = EwcMemory.empty(shards_of(first))
    memory.replace_by_l2(shards_of(first), "first")
    memory.replace_by_l2(shards_of(second), "second")
    theta = random_weights(2, SHAPES)
    value = float(EwcPenalty(memory, 4.0).local_value(shards_of(theta)))
    assert math.isclose(value, 2.0 * sum(float((theta[n] - second[n]).square().sum()) for n in SHAPES), rel_tol=1e-12)


def test_proximal_solves_its_quadratic_and_stays_finite_for_every_strength() -> None:
    theta, mu = torch.tensor([1.0, -2.0, 3.0, 4.0]), torch.tensor([0.5, 0.5, 0.5, 0.5])
    precision = torch.tensor([0.0, 1e-12, 1.0, 1e30])
    for strength in (1.0, 1e9, 1e30):
        edited = theta.clone()
        proximal_step(edited, precision, mu, 0.1 * strength)
        c = precision.double() * (0.1 * strength)
        expected = ((theta + c * mu) / (1 + c)).float()
        assert edited[0] == theta[0]
        torch.testing.assert_close(edited, expected, rtol=2e-6, atol=2e-7)


def descend(application: str, strength: float, steps: int = 200) -> torch.Tensor:
    """Plain SGD of rate 0.1 on |theta - 1|^2 / 2 with a penalty that holds theta at 0."""
    weights = {"w": torch.zeros(4)}
    memory = EwcMemory.empty(shards_of(weights))
    memory.add_task(shards_of(weights), [torch.tensor([0.0, 1e-3, 1.0, 10.0])], RECORD)
    penalty = EwcPenalty(memory, strength, application)
    theta = {"w": torch.full((4,), 0.5, requires_grad=True)}
    for _ in range(steps):
        theta["w"].grad = theta["w"].detach() - 1.0
        penalty.add_gradients(shards_of(theta))
        with torch.no_grad():
            theta["w"] -= 0.1 * theta["w"].grad
        penalty.after_step(shards_of(theta), 0.1)
    return theta["w"].detach()


@pytest.mark.parametrize("strength", [1.0, 1e3, 1e6, 1e9])
def test_proximal_never_diverges_and_reaches_the_minimum(strength: float) -> None:
    expected = 1.0 / (1.0 + strength * torch.tensor([0.0, 1e-3, 1.0, 10.0]))
    torch.testing.assert_close(descend("proximal", strength, 400), expected, rtol=1e-3, atol=1e-6)


def test_coupled_diverges_where_proximal_does_not() -> None:
    assert not torch.isfinite(descend("coupled", 1e6)).all()
    assert not torch.isfinite(descend("coupled", 1e9)).all()
    assert torch.isfinite(descend("coupled", 1.0)).all()


def test_memory_does_not_grow_with_the_number_of_tasks() -> None:
    one = memory_of([random_weights(0, SHAPES)], [positive(1)])
    many = memory_of([random_weights(k, SHAPES) for k in range(20)], [positive(k) for k in range(20)])
    assert one.num_bytes == many.num_bytes == 2 * 8 * (15 + 7 + 1)


def test_ranks_together_hold_the_value_that_one_rank_holds() -> None:
    anchors, fishers = [random_weights(k, SHAPES) for k in range(3)], [positive(k + 10) for k in range(3)]
    theta = random_weights(9, SHAPES)
    whole = float(EwcPenalty(memory_of(anchors, fishers), 2.0).local_value(shards_of(theta)))
    for world_size in (2, 3, 4):
        total = 0.0
        for rank in range(world_size):
            memory = EwcMemory.empty(shards_of(theta, rank, world_size))
            for anchor, fisher in zip(anchors, fishers, strict=True):
                pieces = shards_of(anchor, rank, world_size)
                memory.add_task(pieces, [fisher[s.name].view(-1)[s.start : s.stop] for s in pieces], RECORD)
            total += float(EwcPenalty(memory, 2.0).local_value(shards_of(theta, rank, world_size)))
        assert math.isclose(total, whole, rel_tol=1e-12)


def test_a_gap_of_nothing_important_takes_the_new_anchor() -> None:
    zero = torch.zeros(3)
    precision, centre, grown = merge_task(zero, torch.ones(3), zero, torch.tensor([4.0, 5.0, 6.0]))
    assert torch.equal(precision, zero) and torch.equal(centre, torch.tensor([4.0, 5.0, 6.0])) and grown == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e-3])
def test_a_fisher_that_would_poison_training_is_refused(bad: float) -> None:
    weights = random_weights(0, SHAPES)
    fisher = positive(1)
    fisher["b"][3] = bad
    with pytest.raises(CheckpointError, match=r"Fisher of b") as caught:
        memory_of([weights], [fisher])
    assert caught.value.allowed and caught.value.action


def test_a_missing_anchor_is_refused() -> None:
    weights = random_weights(0, SHAPES)
    weights["b"][0] = float("nan")
    with pytest.raises(CheckpointError, match="anchor of b"):
        memory_of([weights], [positive(1)])


def test_a_fisher_of_another_model_is_refused_with_the_differences() -> None:
    memory = memory_of([random_weights(0, SHAPES)], [positive(1)])
    other = shards_of(random_weights(0, {"a.weight": (5, 4), "b": (7,), "new": (2,)}))
    with pytest.raises(CheckpointError) as caught:
        EwcPenalty(memory, 1.0).local_value(other)
    message = str(caught.value)
    assert "scalar" in message and "new" in message and "[5, 4]" in message and "[5, 3]" in message


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_strength_below_zero_or_not_finite_is_refused(bad: float) -> None:
    memory = memory_of([random_weights(0, SHAPES)], [positive(1)])
    with pytest.raises(ConfigError, match=r"continual\.strength"):
        EwcPenalty(memory, bad)
    with pytest.raises(ConfigError, match=r"component_strength\.encoder"):
        EwcPenalty(memory, 1.0, component_strength={"encoder": bad})


def test_another_estimator_in_a_later_stage_is_refused() -> None:
    weights = random_weights(0, SHAPES)
    memory = memory_of([weights], [positive(1)])
    shards = shards_of(weights)
    with pytest.raises(CheckpointError, match="'sampled'"):
        memory.add_task(shards, [s.value.square() for s in shards], TaskRecord("second", estimator="sampled"))
