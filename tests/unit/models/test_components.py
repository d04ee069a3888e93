"""The names that `continual.component_strength` may use are those that the models give to their parameters."""

from __future__ import annotations

import pytest

from hsmn_dist.config.continual import COMPONENTS
from hsmn_dist.config.models import HopeConfig, HsmnConfig, HsmnHopeConfig
from hsmn_dist.models.build import build_model

SIZES = {"vocab_size": 64, "d_model": 16, "num_heads": 2, "d_feed_forward": 32}


@pytest.mark.parametrize(
    "config",
    [
        HsmnConfig(**SIZES, num_encoder_layers=1, num_decoder_layers=1, ties_embeddings=False),
        HopeConfig(**SIZES, num_layers=1),
        HsmnHopeConfig(**SIZES, num_encoder_layers=1, num_decoder_layers=1, ties_embeddings=False),
    ],
    ids=lambda config: config.family,
)
def test_every_component_of_a_family_may_have_its_own_strength(config):
    assert set(build_model(config).parameter_components().values()) == set(COMPONENTS[config.family])
