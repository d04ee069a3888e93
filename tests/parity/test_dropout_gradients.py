"""Gradients with dropout on, blocks recomputed, against finite differences: the HOPE family and the hybrid, in float64.

(HSMN has the same test in unit/models/hsmn/test_model.py.) The original's recomputed forward drew a new dropout mask, so its
gradients were those of another function; equal gradients of two autograd passes would not show that, differences of losses do.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hsmn_dist.config.models import HopeConfig, HsmnHopeConfig
from hsmn_dist.continual.labels import wide_cross_entropy
from hsmn_dist.models.build import build_model
from hsmn_dist.models.contract import LanguageModel, ModelInput
from hsmn_dist.training.activation_checkpointing import checkpoint_blocks
from tests.support import hope_models, hsmn_models

STEP = 1e-6
HYBRID = {**hsmn_models.tiny_config(encoder_dropout=0.3, decoder_dropout=0.3).model_dump(), "family": "hsmn_hope"}
CONFIGS: dict[str, HopeConfig | HsmnHopeConfig] = {
    "attention_decay": hope_models.tiny_config(dropout=0.3),
    "linear_chain": hope_models.tiny_config(dropout=0.3, num_layers=1, mixer="linear", cms=hope_models.chain((3, 6))),
    "self_modifying": hope_models.tiny_config(
        dropout=0.3, num_layers=1, mixer="self_modifying", self_modifying=hope_models.small_memories(momentum=0.8)
    ),
    "hybrid_decay": HsmnHopeConfig(**{**HYBRID, "chunk_tokens": 3, "num_memory_modules": 2}),
    "hybrid_chain": HsmnHopeConfig(**{**HYBRID, "cms": hope_models.chain((2, 4))}),
}


def shaken(config: HopeConfig | HsmnHopeConfig) -> LanguageModel:
    """A float64 model in training mode with weights moved off their start, its blocks recomputed."""
    torch.manual_seed(0)
    model = build_model(config).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    checkpoint_blocks(model, "every_block")
    return model


def seeded_loss(model: LanguageModel, inputs: ModelInput) -> Tensor:
    """In float64: the models' own loss is fp32, whose differences over a small step are noise."""
    torch.manual_seed(7)
    nll = model(inputs, target_loss=wide_cross_entropy).nll
    assert nll is not None
    return nll.sum()


def slope(model: LanguageModel, inputs: ModelInput, entries: Tensor, index: int) -> float:
    """Central difference of the loss in one entry of a parameter."""
    start, values = float(entries[index]), []
    with torch.no_grad():
        for step in (STEP, -STEP):
            entries[index] = start + step
            values.append(float(seeded_loss(model, inputs)))
        entries[index] = start
    return (values[0] - values[1]) / (2 * STEP)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_with_dropout_under_activation_checkpointing_equal_finite_differences(name: str) -> None:
    model: Any = shaken(CONFIGS[name])
    inputs = hope_models.batch([7, 4], [5, 3])
    seeded_loss(model, inputs).backward()
    generator = torch.Generator().manual_seed(1)
    parameters = dict(model.named_parameters())
    for parameter_name in sorted(parameters)[:: len(parameters) // 4]:
        parameter = parameters[parameter_name]
        index = int(parameter.grad.abs().flatten().topk(min(5, parameter.numel())).indices[-1])
        if bool(torch.randint(2, (), generator=generator)):
            index = int(torch.randint(parameter.numel(), (), generator=generator))
        found, wanted = float(parameter.grad.view(-1)[index]), slope(model, inputs, parameter.data.view(-1), index)
        assert abs(found - wanted) < 1e-6 * max(1.0, abs(wanted)), (parameter_name, found, wanted)
    assert not torch.equal(seeded_loss(model.eval(), inputs), seeded_loss(model.train(), inputs)), "dropout was off"
