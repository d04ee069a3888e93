"""Without dropout training mode computes what evaluation mode computes, bit for bit.

Public HOPE code clipped a norm in training mode only, and so was trained and scored as two different models.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hsmn_dist.models.build import build_model
from hsmn_dist.models.contract import LanguageModel
from tests.support import hope_models, hsmn_models

MODELS: dict[str, dict[str, Any]] = {
    "attention_decay": {},
    "linear_chain": {"mixer": "linear", "cms": hope_models.chain((3, 6))},
    "chain_nested": {"cms": hope_models.chain(variant="nested")},
    "self_modifying": {"mixer": "self_modifying", "self_modifying": hope_models.small_memories(momentum=0.8)},
    "self_modifying_matrix": {"mixer": "self_modifying", "self_modifying": hope_models.small_memories(memory="matrix")},
}


def logits_of(model: LanguageModel, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        logits = model(inputs).logits
    assert logits is not None
    return logits


@pytest.mark.parametrize("name", MODELS)
def test_hope_computes_the_same_in_both_modes(name: str) -> None:
    model, inputs = hope_models.tiny_model(**MODELS[name]), hope_models.batch([5, 0], [6, 4])
    assert torch.equal(logits_of(model.train(), inputs), logits_of(model.eval(), inputs))


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_hsmn_computes_the_same_in_both_modes(placement: str) -> None:
    torch.manual_seed(0)
    config = hsmn_models.tiny_config(encoder_dropout=0.0, decoder_dropout=0.0, norm_placement=placement)
    model, inputs = build_model(config), hsmn_models.batch([20, 0], [6, 4])
    assert torch.equal(logits_of(model.train(), inputs), logits_of(model.eval(), inputs))
