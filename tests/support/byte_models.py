"""Tiny models of both families with fresh weights on a byte tokenizer, behind the text interface."""

from __future__ import annotations

import torch

from hsmn_dist.config.models import HopeConfig, HsmnConfig
from hsmn_dist.data.tokenizer import ByteTokenizer
from hsmn_dist.models.build import build_model
from hsmn_dist.models.text_model import LocalTextModel


def byte_config(family: str) -> HsmnConfig | HopeConfig:
    """The configuration of the tiny models."""
    config = HsmnConfig if family == "hsmn" else HopeConfig
    return config(vocab_size=ByteTokenizer().vocab_size, d_model=32, num_heads=2)


def byte_text_model(family: str, seed: int = 0, **changes) -> LocalTextModel:
    """A LocalTextModel whose hidden weights are larger than at init, so that its choices are no near-ties."""
    torch.manual_seed(seed)
    tokenizer = ByteTokenizer()
    model = build_model(byte_config(family))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                module.weight.mul_(3.0)
    return LocalTextModel(model, tokenizer, **{"max_context_tokens": 512, **changes})
