"""Tiny models of every kind that the planner knows, and a batch for them."""

from __future__ import annotations

import torch

from hsmn_dist.config.models import (
    CmsConfig,
    HopeConfig,
    HsmnConfig,
    HsmnHopeConfig,
    MemoryLevelConfig,
    ModelConfig,
    SelfModifyingConfig,
)
from hsmn_dist.models.contract import ModelInput

_HSMN = {
    "vocab_size": 701,
    "d_model": 48,
    "num_heads": 4,
    "d_feed_forward": 112,
    "num_encoder_layers": 2,
    "num_decoder_layers": 3,
    "chunk_size": 16,
    "chunk_stride": 7,
    "d_compressed": 20,
    "d_aggregator": 36,
    "aggregator_rank": 10,
    "max_target_tokens": 64,
}
_HOPE = {"vocab_size": 701, "d_model": 48, "num_layers": 3, "num_heads": 4, "d_feed_forward": 112}

CHAIN = CmsConfig(
    form="chain", levels=(MemoryLevelConfig(period=32, hidden_units=40), MemoryLevelConfig(period=64, hidden_units=24))
)

MODELS: dict[str, ModelConfig] = {
    "hsmn": HsmnConfig(**_HSMN, encoder_dropout=0.0, decoder_dropout=0.0),
    "hsmn_dropout": HsmnConfig(**_HSMN),
    "hsmn_tied": HsmnConfig(**_HSMN, ties_embeddings=True, uses_level_embedding=False, decoder_dropout=0.0),
    "hybrid": HsmnHopeConfig(**_HSMN, num_memory_modules=3, chunk_tokens=16, encoder_dropout=0.0, decoder_dropout=0.0),
    "hybrid_dropout": HsmnHopeConfig(**_HSMN, num_memory_modules=3, chunk_tokens=8),
    "hope": HopeConfig(**_HOPE, num_memory_modules=3, chunk_tokens=16),
    "hope_one_chunk": HopeConfig(**_HOPE, num_memory_modules=3, chunk_tokens=512),
    "hope_no_cms": HopeConfig(**_HOPE, uses_cms=False),
    "hope_no_mlp": HopeConfig(**_HOPE, uses_mlp=False, chunk_tokens=8),
    "hope_linear": HopeConfig(**_HOPE, mixer="linear", num_memory_modules=3, chunk_tokens=16),
    "hope_linear_alone": HopeConfig(**_HOPE, mixer="linear", uses_cms=False, chunk_tokens=8, positions="none"),
    "hope_self_modifying": HopeConfig(
        **_HOPE,
        mixer="self_modifying",
        uses_cms=False,
        self_modifying=SelfModifyingConfig(hidden_units=16, chunk_tokens=64, memory_chunk_tokens=32),
    ),
    "hope_matrix": HopeConfig(
        **_HOPE,
        mixer="self_modifying",
        num_memory_modules=2,
        self_modifying=SelfModifyingConfig(memory="matrix", chunk_tokens=64, memory_chunk_tokens=64),
    ),
    "hope_chain": HopeConfig(**_HOPE, cms=CHAIN),
    "hope_by_depth": HopeConfig(**_HOPE, cms=CHAIN.model_copy(update={"spread": "by_depth"})),
    "hope_optimizer_chain": HopeConfig(**_HOPE, cms=CHAIN.model_copy(update={"cadence": "optimizer"})),
    "hybrid_chain": HsmnHopeConfig(**_HSMN, cms=CHAIN, encoder_dropout=0.0, decoder_dropout=0.0),
    "hope_learned": HopeConfig(**_HOPE, positions="learned", ties_embeddings=True, max_tokens=256, chunk_tokens=16),
}


def full_batch(context_tokens: int, target_tokens: int, examples: int = 2) -> ModelInput:
    """A batch without padding."""
    generator = torch.Generator().manual_seed(0)

    def ids(tokens: int) -> torch.Tensor:
        return torch.randint(4, 700, (examples, tokens), generator=generator)

    context, target = ids(context_tokens), ids(target_tokens)
    return ModelInput(context, torch.ones_like(context).bool(), target, torch.ones_like(target).bool())
