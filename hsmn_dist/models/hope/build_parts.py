"""From `HopeConfig` to the parts of a block; the only place that chooses between variants."""

from __future__ import annotations

from torch import nn

from hsmn_dist.config.models import HopeConfig
from hsmn_dist.models.hope.block import DecayMemory, HopeBlock, PlainMlp
from hsmn_dist.models.hope.continuum_memory import ContinuumMemory
from hsmn_dist.models.hope.mixers import AttentionMixer, LinearMixer
from hsmn_dist.models.hope.self_modifying import SelfModifyingTitans


def build_block(config: HopeConfig) -> HopeBlock:
    """One block of the configured kind."""
    mlp = PlainMlp(config.d_model, config.d_feed_forward) if config.uses_mlp else None
    cms = _build_cms(config) if config.uses_cms else None
    return HopeBlock(config.d_model, _build_mixer(config), cms, mlp, config.dropout)


def _build_mixer(config: HopeConfig) -> nn.Module:
    if config.mixer == "attention":
        return AttentionMixer(config.d_model, config.num_heads)
    if config.mixer == "linear":
        return LinearMixer(config.d_model, config.num_heads, config.chunk_tokens)
    return SelfModifyingTitans(config.d_model, config.num_heads, config.self_modifying)


def _build_cms(config: HopeConfig) -> nn.Module:
    return DecayMemory(
        ContinuumMemory(
            config.d_model,
            config.num_heads,
            config.num_memory_modules,
            chunk_size=config.chunk_tokens,
        )
    )
