"""build_model: from a configuration section to a model with fresh weights; one line for each family."""

from __future__ import annotations

from hsmn_dist.config.models import HopeConfig, HsmnConfig, ModelConfig
from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.models.contract import LanguageModel


def build_model(config: ModelConfig) -> LanguageModel:
    """A model of the family that `config` names, its weights drawn by `init_weights` from the global generator."""
    model = construct_model(config)
    model.init_weights()
    return model


def construct_model(config: ModelConfig) -> LanguageModel:
    """As `build_model`, without drawing weights: for loading, and for counting on the meta device."""
    if isinstance(config, HsmnConfig):
        from hsmn_dist.models.hsmn.model import HsmnModel

        return HsmnModel(config)
    if isinstance(config, HopeConfig):
        from hsmn_dist.models.hope.model import HopeModel

        return HopeModel(config)
    raise ModelError(
        f"a configuration of type {type(config).__name__}",
        allowed="HsmnConfig, HsmnHopeConfig or HopeConfig",
        action="set model.family to hsmn, hsmn_hope or hope",
    )
