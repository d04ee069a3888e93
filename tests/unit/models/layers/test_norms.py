"""RMSNorm with its gradients written out against PyTorch's own, in every number that both have."""

from __future__ import annotations

import pytest
import torch

from hsmn_dist.models.layers.norms import RMSNorm


def _pair(width: int, dtype: torch.dtype) -> tuple[RMSNorm, torch.nn.RMSNorm]:
    torch.manual_seed(width)
    ours, plain = RMSNorm(width).to(dtype), torch.nn.RMSNorm(width, eps=1e-6).to(dtype)
    torch.nn.init.normal_(plain.weight)
    ours.load_state_dict(plain.state_dict())
    return ours, plain


@pytest.mark.parametrize("shape", [(7,), (1, 5), (2, 3, 33), (2, 1, 4, 8)], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-4, 0.0], ids=["plain", "near epsilon", "zeros"])
def test_values_and_gradients_equal_pytorchs(shape: tuple[int, ...], size: float) -> None:
    ours, plain = _pair(shape[-1], torch.float64)
    x = (size * torch.randn(*shape, dtype=torch.float64)).requires_grad_()
    seed = torch.randn(*shape, dtype=torch.float64)
    found = [(norm(x), *torch.autograd.grad(norm(x), [x, norm.weight], seed)) for norm in (ours, plain)]
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-12)
    assert type(ours(x).grad_fn).__name__ == "_RmsNormBackward"


def test_gradients_equal_finite_differences() -> None:
    ours, _ = _pair(5, torch.float64)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda given, weight: torch.func.functional_call(ours, {"weight": weight}, given), (x, ours.weight)
    )


def test_half_precision_autocast_and_nothing_are_left_to_pytorch() -> None:
    ours, plain = _pair(16, torch.bfloat16)
    x = torch.randn(3, 16, dtype=torch.bfloat16, requires_grad=True)
    assert torch.equal(ours(x), plain(x)) and type(ours(x).grad_fn).__name__ != "_RmsNormBackward"
    ours, plain = _pair(16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x.float()), plain(x.float()))
    assert ours(torch.zeros(0, 16)).shape == (0, 16)


def test_per_example_gradients_of_torch_func() -> None:
    ours, plain = _pair(6, torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64)

    def gradients(norm: torch.nn.Module) -> torch.Tensor:
        def loss(weight: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(norm, {"weight": weight}, row).pow(3).sum()

        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(norm.weight, x)

    torch.testing.assert_close(gradients(ours), gradients(plain), rtol=1e-11, atol=1e-12)
