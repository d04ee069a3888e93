"""Tiny HSMN models and micro-batches for tests."""

from __future__ import annotations

import torch

from hsmn_dist.config.models import HsmnConfig
from hsmn_dist.models.contract import ModelInput
from hsmn_dist.models.hsmn.model import HsmnModel

VOCAB_SIZE = 31


def tiny_config(**changes) -> HsmnConfig:
    settings = {
        "vocab_size": VOCAB_SIZE,
        "d_model": 16,
        "num_heads": 2,
        "d_feed_forward": 24,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "chunk_size": 6,
        "chunk_stride": 3,
        "min_chunks": 2,
        "d_compressed": 8,
        "d_aggregator": 12,
        "aggregator_rank": 5,
        "window_size": 4,
        "max_target_tokens": 64,
        **changes,
    }
    return HsmnConfig(**settings)


def tiny_model(seed: int = 0, scale: float = 1.0, **changes) -> HsmnModel:
    """A float64 model in eval mode with biases and norms moved off their start, so every path matters."""
    torch.manual_seed(seed)
    model = HsmnModel(tiny_config(**changes)).double().eval()
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale).add_(torch.randn_like(parameter) * 0.05)
    return model


def batch(context_lengths, target_lengths, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> ModelInput:
    """Rows of the given lengths, every target scored."""
    generator = torch.Generator().manual_seed(seed)
    rows, n, t = len(context_lengths), max(context_lengths), max(1, *target_lengths)
    context = torch.randint(4, vocab_size, (rows, n), generator=generator)
    target = torch.randint(4, vocab_size, (rows, t), generator=generator)
    context_mask = torch.arange(n)[None] < torch.tensor(context_lengths)[:, None]
    loss_mask = torch.arange(t)[None] < torch.tensor(target_lengths)[:, None]
    return ModelInput(context * context_mask, context_mask, target * loss_mask, loss_mask)


def row(inputs: ModelInput, index: int) -> ModelInput:
    """One row alone, cut to its own lengths (its target to at least one token)."""
    n, t = int(inputs.context_mask[index].sum()), max(1, int(inputs.loss_mask[index].sum()))
    s = slice(index, index + 1)
    return ModelInput(
        inputs.context_ids[s, :n], inputs.context_mask[s, :n], inputs.target_ids[s, :t], inputs.loss_mask[s, :t]
    )


def gradients(model: HsmnModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradient of every parameter; zeros where none arrives."""
    model.zero_grad()
    loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_gradients_close(found, expected, tolerance: float = 1e-10) -> None:
    """Largest difference of each gradient, relative to the largest gradient of that parameter."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        size = float(gradient.abs().max())
        error = float((found[name] - gradient).abs().max())
        assert error <= tolerance * size + 1e-14, f"{name}: error {error:.2e} of {size:.2e}"
