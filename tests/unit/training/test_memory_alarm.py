"""A stage reports the health of every memory level, and says at its end which levels never learned."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from hsmn_dist.config.models import HsmnHopeConfig, ModelConfig
from hsmn_dist.distributed.world import World
from hsmn_dist.models.build import build_model
from hsmn_dist.training.build import build_engine
from hsmn_dist.training.loop import train
from tests.support import hope_models, hsmn_models
from tests.support.stages import OPTIM, TinyStage, training_config

NEVER_REACHED = 1024
CHAIN = hope_models.chain((2, NEVER_REACHED))
HYBRID = {**hsmn_models.tiny_config().model_dump(), "family": "hsmn_hope", "cms": CHAIN}
MODELS: dict[str, ModelConfig] = {
    "hope": hope_models.tiny_config(num_layers=1, cms=CHAIN),
    "hsmn_hope": HsmnHopeConfig.model_validate({**HYBRID, "num_decoder_layers": 1}),
}


@pytest.mark.parametrize("family", MODELS)
def test_a_level_that_no_sequence_is_long_enough_for_is_named_and_the_living_one_is_not(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = TinyStage(tmp_path, World(), training_config(), num_steps=4)
    engine = build_engine(stage.training, OPTIM, lambda: build_model(MODELS[family]), World())
    monkeypatch.setattr(logging.getLogger("hsmn_dist"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        train(stage.parts(engine=engine))
    warnings = [record.getMessage() for record in caplog.records if "never learned" in record.getMessage()]
    assert len(warnings) == 1 and "level_1/block_0" in warnings[0] and "level_0" not in warnings[0]
    for quantity in ("updates", "gradient_norm", "change_norm"):
        living, dead = (stage.tracker.series(f"memory/level_{level}_{quantity}/block_0") for level in (0, 1))
        assert living and all(value > 0 for _, value in living), quantity
        assert dead and (quantity == "gradient_norm" or all(value == 0 for _, value in dead)), quantity
