"""Tiny HOPE models and micro-batches for tests."""

from __future__ import annotations

import torch

from hsmn_dist.config.models import HopeConfig
from hsmn_dist.models.contract import ModelInput
from hsmn_dist.models.hope.model import HopeModel


def tiny_config(**changes) -> HopeConfig:
    settings = {
        "vocab_size": 29,
        "d_model": 16,
        "num_layers": 2,
        "num_heads": 2,
        "d_feed_forward": 24,
        "num_memory_modules": 3,
        "chunk_tokens": 4,
        **changes,
    }
    return HopeConfig(**settings)


def small_memories(**changes) -> dict:
    """Self-modifying memories with chunks of 4 tokens."""
    return {"hidden_units": 5, "chunk_tokens": 4, "memory_chunk_tokens": 4, "initial_rate": 0.1, **changes}


def chain(periods=(2, 4), **changes) -> dict:
    """A chain of small MLP levels."""
    rate = {"rate_scale": 0.5} if changes.get("cadence") == "optimizer" else {"learning_rate": 2.0}
    levels = [{"period": period, "hidden_units": 6, **rate} for period in periods]
    return {"form": "chain", "levels": levels, **changes}


def tiny_model(seed: int = 0, scale: float = 4.0, **changes) -> HopeModel:
    """A float64 model whose hidden weights are larger than at init, so that every path matters."""
    torch.manual_seed(seed)
    model = HopeModel(tiny_config(**changes)).double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                module.weight.mul_(scale)
    return model


def batch(context_lengths, target_lengths, seed: int = 0, vocab_size: int = 29) -> ModelInput:
    """Rows of the given lengths, every target scored."""
    generator = torch.Generator().manual_seed(seed)
    rows, n, t = len(context_lengths), max(context_lengths), max(target_lengths)
    context = torch.randint(4, vocab_size, (rows, n), generator=generator)
    target = torch.randint(4, vocab_size, (rows, t), generator=generator)
    context_mask = torch.arange(n)[None] < torch.tensor(context_lengths)[:, None]
    loss_mask = torch.arange(t)[None] < torch.tensor(target_lengths)[:, None]
    return ModelInput(context * context_mask, context_mask, target * loss_mask, loss_mask)


def row(inputs: ModelInput, index: int) -> ModelInput:
    """One row alone, cut to its own lengths."""
    n, t = int(inputs.context_mask[index].sum()), int(inputs.loss_mask[index].sum())
    s = slice(index, index + 1)
    return ModelInput(
        inputs.context_ids[s, :n], inputs.context_mask[s, :n], inputs.target_ids[s, :t], inputs.loss_mask[s, :t]
    )
