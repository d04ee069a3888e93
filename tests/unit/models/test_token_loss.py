"""Losses of single tokens against PyTorch's cross entropy: values, gradients, precisions, and what is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from hsmn_dist.models.token_loss import token_cross_entropy


def both(logits: torch.Tensor, labels: torch.Tensor, seed: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Losses and gradients: ours in the logits' precision, PyTorch's in float64."""
    found = []
    for function, dtype in ((token_cross_entropy, logits.dtype), (_plain, torch.float64)):
        leaf = logits.to(dtype).detach().requires_grad_()
        losses = function(leaf, labels)
        found.append((losses, torch.autograd.grad(losses, leaf, seed.to(losses.dtype))[0]))
    return found


def _plain(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits, labels, reduction="none")


@pytest.mark.parametrize("size", [1.0, 30.0, 1e4], ids=["plain", "sharp", "far beyond exp"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (33, 101)], ids=str)
def test_values_and_gradients_equal_pytorchs(shape: tuple[int, int], size: float) -> None:
    torch.manual_seed(0)
    logits, labels = size * torch.randn(shape), torch.randint(0, shape[1], shape[:1])
    (losses, gradient), (expected, wanted) = both(logits, labels, torch.randn(shape[0]))
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-6)


def test_a_sure_token_has_a_small_gradient_in_half_precision_too() -> None:
    logits = torch.tensor([[12.0, 0.0, 1.0]], dtype=torch.bfloat16)
    (losses, gradient), (expected, wanted) = both(logits, torch.tensor([0]), torch.ones(1))
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(losses.double(), expected, rtol=2e-2, atol=1e-6)
    torch.testing.assert_close(
        gradient.double(), wanted, rtol=1e-2, atol=1e-7
    )  # rounding p first would give 0 or -2^-8


def test_excluded_labels_and_hopeless_ones() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0], [0.0, -torch.inf, 1.0], [200.0, 0.0, 0.0]])
    (losses, gradient), (expected, wanted) = both(logits, torch.tensor([2, 1, 1]), torch.ones(3))
    torch.testing.assert_close(losses.double(), expected)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-7)


def test_one_table_is_kept_and_the_logits_are_not() -> None:
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    logits = torch.randn(5, 40, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = token_cross_entropy(logits * 1.0, torch.zeros(5, dtype=torch.long))
    assert sorted(tensor.numel() for tensor in kept.values()) == [5, 200]
    losses.sum().backward()
    assert logits.grad is not None


def test_without_gradients_and_under_torch_func_it_is_pytorchs() -> None:
    torch.manual_seed(1)
    logits, labels = torch.randn(4, 9), torch.randint(0, 9, (4,))
    assert torch.equal(token_cross_entropy(logits, labels), _plain(logits, labels))
    found = torch.func.grad(lambda given: token_cross_entropy(given, labels).sum())(logits)
    torch.testing.assert_close(found, both(logits, labels, torch.ones(4))[0][1], rtol=1e-5, atol=1e-7)


def test_a_label_beyond_the_vocabulary_is_refused() -> None:
    with pytest.raises((IndexError, RuntimeError)):
        token_cross_entropy(torch.randn(2, 5, requires_grad=True), torch.tensor([0, 5]))
