"""From `HopeConfig` to the parts of a block; the only place that chooses between variants."""

from __future__ import annotations

from torch import nn

from hsmn_dist.config.models import HopeConfig, HsmnHopeConfig
from hsmn_dist.models.hope.block import DecayMemory, HopeBlock
from hsmn_dist.models.hope.chain_memory import ChainMemory
from hsmn_dist.models.hope.continuum_memory import ContinuumMemory, retentions
from hsmn_dist.models.hope.mixers import AttentionMixer, LinearMixer
from hsmn_dist.models.hope.optimizer_chain import OptimizerChain
from hsmn_dist.models.hope.self_modifying import SelfModifyingTitans
from hsmn_dist.models.layers.feed_forward import FeedForward


def build_block(config: HopeConfig, index: int) -> HopeBlock:
    """Block number `index` of the configured kind."""
    mlp = FeedForward(config.d_model, config.d_feed_forward, "gelu") if config.uses_mlp else None
    cms = build_cms(config, index) if config.uses_cms else None
    return HopeBlock(config.d_model, _build_mixer(config), cms, mlp, config.dropout)


def _build_mixer(config: HopeConfig) -> nn.Module:
    if config.mixer == "attention":
        return AttentionMixer(config.d_model, config.num_heads)
    if config.mixer == "linear":
        return LinearMixer(config.d_model, config.num_heads, config.chunk_tokens)
    return SelfModifyingTitans(config.d_model, config.num_heads, config.self_modifying)


def build_cms(config: HopeConfig | HsmnHopeConfig, index: int) -> nn.Module:
    """The continuum memory of block `index`; maps (x, state, info) to (y, state, health scalars)."""
    settings = config.cms
    if settings.form == "chain":
        if settings.spread == "by_depth":
            level = settings.levels[index % len(settings.levels)]
            settings = settings.model_copy(update={"levels": (level,)})
        return (ChainMemory if settings.cadence == "tokens" else OptimizerChain)(config.d_model, settings)
    taus = retentions(config.num_memory_modules, settings.fastest_retention, settings.slowest_retention)
    memory = ContinuumMemory(
        config.d_model,
        config.num_heads,
        taus=taus,
        reads_after_write=settings.reads_after_write,
        corrects_bias=settings.corrects_bias,
        chunk_size=config.chunk_tokens,
    )
    return DecayMemory(memory)
