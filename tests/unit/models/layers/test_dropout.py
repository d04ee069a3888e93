"""Dropout with its own masks: how often, how much, which gradients, and where PyTorch's own takes over."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hsmn_dist.models.layers.dropout import Dropout

WRITTEN_OUT = "_DroppedBackward"


def _given(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.93])
def test_each_of_four_neighbours_is_zeroed_at_the_rate_and_the_rest_is_scaled(rate: float) -> None:
    # Four elements share a number: each of its quarters must be uniform, and two of them independent.
    torch.manual_seed(3)
    num_groups = 200_000
    dropped = Dropout(rate)(torch.ones(num_groups, 4, dtype=torch.float64))
    zeroed = (dropped == 0).double()
    tolerance = 5 * math.sqrt(rate * (1 - rate) / num_groups)
    for column in range(4):
        assert abs(float(zeroed[:, column].mean()) - rate) < tolerance
        for other in range(column):
            both = float((zeroed[:, column] * zeroed[:, other]).mean())
            assert abs(both - rate**2) < 5 * math.sqrt(rate**2 * (1 - rate**2) / num_groups)
    kept = dropped[dropped != 0].unique()
    assert kept.tolist() == [65536 / (65536 - round(rate * 65536))]


@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 7), (2, 3, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_one_mask(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, other, seed = _given(*shape, dtype=dtype), _given(*shape, dtype=dtype), torch.randn(shape).to(dtype)
    torch.manual_seed(0)
    mask = Dropout(0.25)(torch.ones(shape, dtype=dtype))
    for added_to in (None, other):
        torch.manual_seed(0)
        y = Dropout(0.25)(x, added_to)
        assert type(y.grad_fn).__name__ == WRITTEN_OUT and y.dtype == dtype
        plain = x * mask if added_to is None else added_to + x * mask
        torch.testing.assert_close(y, plain, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
        leaves = [x] if added_to is None else [x, added_to]
        found, wanted = torch.autograd.grad(y, leaves, seed), torch.autograd.grad(plain, leaves, seed)
        torch.testing.assert_close(found, wanted)


def test_a_residual_seen_in_part_and_gradients_that_nobody_wants() -> None:
    whole, x = _given(3, 5, 8), _given(3, 1, 8)

    def seeded(given: Tensor, residual: Tensor) -> Tensor:
        torch.manual_seed(5)
        return Dropout(0.5)(given, residual[:, :1])  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(seeded, (x, whole)) and torch.autograd.gradgradcheck(seeded, (x, whole))
    seeded(x.detach(), whole).sum().backward()
    assert whole.grad is not None and float(whole.grad.sum()) == 24


def test_the_mask_is_the_generators_and_takes_a_byte() -> None:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        torch.manual_seed(2)
        first = Dropout(0.1)(_given(33, dtype=torch.float32))
    assert [tensor.nbytes for tensor in kept] == [33]
    second = Dropout(0.1)(_given(33, dtype=torch.float32))
    torch.manual_seed(2)
    assert torch.equal(first, Dropout(0.1)(_given(33, dtype=torch.float32))) and not torch.equal(first, second)


def test_evaluation_no_rate_and_rates_that_round_away() -> None:
    x, other = _given(4, 4), _given(4, 4)
    assert torch.equal(Dropout(0.5).eval()(x, other), other + x) and torch.equal(Dropout(0.0)(x), x)
    assert not Dropout(1.0)(x).any()
    torch.testing.assert_close(Dropout(1e-9)(x), x)
    assert Dropout(0.5)(torch.zeros(0, 4)).shape == (0, 4)
    assert Dropout(0.5)(_given(4, dtype=torch.float32), _given(4)).dtype == torch.float64


def test_recording_is_left_to_pytorch() -> None:
    def loss(row: Tensor) -> Tensor:
        return Dropout(0.5)(row, row).sum()  # type: ignore[no-any-return]

    slopes = torch.func.vmap(torch.func.grad(loss), randomness="different")(torch.randn(64, 9))
    assert set(slopes.unique().tolist()) == {1.0, 3.0}
