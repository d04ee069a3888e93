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


@pytest.mark.parametrize("num_tasks", range(1, 51))
def test_merged_penalty_equals_the_list(num_tasks: int) -> None:
    """In float64 within 1e-12; in fp32 buffers within 1e-6 of the float64 list."""
    anchors, fishers, theta = (t.float().double() for t in tasks(num_tasks))
    spread = fishers[fishers > 0].log10()
    assert float(spread.max() - spread.min()) > 11 and (fishers == 0).any() and (fishers.sum(0) == 0).any()
    wanted = float((fishers * (theta - anchors) ** 2).sum())
    wanted_gradient = (2.0 * fishers * (theta - anchors)).sum(0)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        value, gradient, _ = merged(anchors, fishers, theta, dtype)
        assert abs(value - wanted) <= tolerance * wanted
        error = (gradient.double() - wanted_gradient).abs()
        assert float(error.norm()) <= tolerance * float(wanted_gradient.norm())
        # Terms of both signs cancel in the list too, so each entry's error is measured against their size.
        assert (error <= tolerance * (2.0 * fishers * (theta.abs() + anchors.abs())).sum(0)).all()


def test_two_buffers_replace_a_growing_list() -> None:
    """Bytes of every tensor that a memory holds: the same after 1, 10 and 50 tasks."""
    sizes = set()
    for num_tasks in (1, 10, 50):
        memory = merged(*tasks(num_tasks), torch.float32)[2]
        held = [value for shard in memory.shards for value in vars(shard).values() if isinstance(value, torch.Tensor)]
        assert memory.num_bytes == sum(t.numel() * t.element_size() for t in held)
        assert len(memory.tasks) == num_tasks
        sizes.add(memory.num_bytes)
    assert sizes == {2 * 4 * NUM_ELEMENTS}
