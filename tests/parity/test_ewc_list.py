"""The merged penalty against the explicit list of K penalties, one Fisher and one anchor a task."""

from __future__ import annotations

import pytest
import torch

from hsmn_dist.continual.ewc import EwcMemory, EwcPenalty, TaskRecord
from tests.support.param_shards import shards_of

NUM_ELEMENTS = 400
RECORD = TaskRecord("task")


def tasks(num_tasks: int):
    """Anchors that drift, Fishers with zeros and twelve orders of magnitude between entries."""
    generator = torch.Generator().manual_seed(num_tasks)
    anchors = torch.randn(num_tasks, NUM_ELEMENTS, generator=generator, dtype=torch.float64)
    fishers = 10.0 ** (12 * torch.rand(num_tasks, NUM_ELEMENTS, generator=generator, dtype=torch.float64) - 9)
    fishers[torch.rand(num_tasks, NUM_ELEMENTS, generator=generator) < 0.3] = 0.0
    fishers[:, :20] = 0.0
    theta = torch.randn(NUM_ELEMENTS, generator=generator, dtype=torch.float64)
    return anchors, fishers, theta


def merged(anchors, fishers, theta, dtype):
    memory = EwcMemory.empty(shards_of({"w": theta.to(dtype)}))
    for anchor, fisher in zip(anchors, fishers, strict=True):
        memory.add_task(shards_of({"w": anchor.to(dtype)}), [fisher.to(dtype)], RECORD)
    weight = theta.to(dtype).clone().requires_grad_()
    weight.grad = torch.zeros_like(weight)
    penalty = EwcPenalty(memory, 2.0)
    shards = shards_of({"w": weight})
    penalty.add_gradients(shards)
    return float(penalty.local_value(shards)), weight.grad, memory


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 7, 20, 50])
def test_merged_penalty_equals_the_list_in_float64(num_tasks: int) -> None:
    anchors, fishers, theta = tasks(num_tasks)
    value, gradient, _ = merged(anchors, fishers, theta, torch.float64)
    expected = (2.0 / 2 * fishers * (theta - anchors) ** 2).sum()
    expected_gradient = (2.0 * fishers * (theta - anchors)).sum(0)
    assert abs(value - float(expected)) <= 1e-12 * float(expected)
    # Terms of both signs cancel in the list too, so the error is measured against their size.
    scale = (2.0 * fishers * (theta - anchors).abs()).sum(0)
    assert ((gradient - expected_gradient).abs() <= 1e-12 * scale).all()


@pytest.mark.parametrize("num_tasks", [1, 5, 50])
def test_merged_penalty_in_fp32_equals_the_float64_list_within_1e_6(num_tasks: int) -> None:
    anchors, fishers, theta = (t.float().double() for t in tasks(num_tasks))
    value, gradient, _ = merged(anchors, fishers, theta, torch.float32)
    expected = float((fishers * (theta - anchors) ** 2).sum())
    expected_gradient = (2.0 * fishers * (theta - anchors)).sum(0)
    assert abs(value - expected) <= 1e-6 * expected
    error = (gradient.double() - expected_gradient).norm() / expected_gradient.norm()
    assert error <= 1e-6


def test_two_buffers_replace_a_growing_list() -> None:
    sizes = set()
    for num_tasks in (1, 10, 50):
        anchors, fishers, theta = tasks(num_tasks)
        sizes.add(merged(anchors, fishers, theta, torch.float32)[2].num_bytes)
    assert sizes == {2 * 4 * NUM_ELEMENTS}
