"""The training loss of each family traces as one graph, and computes the same as without a compiler.

`fullgraph=True` raises at the first graph break, with its reason.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from hsmn_dist.models.contract import LanguageModel, ModelInput
from hsmn_dist.training.losses import NllModule, tensors_of
from tests.support import hope_models, hsmn_models

HOPE: dict[str, dict[str, Any]] = {
    "attention": {},
    "linear": {"mixer": "linear"},
    "self_modifying": {"mixer": "self_modifying", "self_modifying": hope_models.small_memories()},
    "chain": {"cms": hope_models.chain()},
    "chain_optimizer": {"cms": hope_models.chain((1, 4), cadence="optimizer", variant="independent")},
    "tied_learned": {"ties_embeddings": True, "positions": "learned", "max_tokens": 64},
}


def built(name: str) -> tuple[LanguageModel, ModelInput]:
    if name == "hsmn":
        return hsmn_models.tiny_model(
            ties_embeddings=True, num_encoder_layers=1, num_decoder_layers=1
        ), hsmn_models.batch([14, 5, 0], [5, 6, 2])
    return hope_models.tiny_model(num_layers=1, **HOPE[name]), hope_models.batch([7, 0, 3], [5, 6, 2])


def loss_and_gradients(
    module: Any, model: LanguageModel, inputs: ModelInput
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    loss = module(*tensors_of(inputs))
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ["hsmn", *HOPE])
def test_the_loss_step_is_one_graph_and_computes_the_same(name: str) -> None:
    model, inputs = built(name)
    inputs.loss_mask[0, 1] = False  # a target in the middle that is not scored
    module = NllModule(model)
    expected, gradients = loss_and_gradients(module, model, inputs)
    torch._dynamo.reset()
    counter = CompileCounter()
    found, others = loss_and_gradients(torch.compile(module, backend=counter, fullgraph=True), model, inputs)
    assert counter.frame_count == 1
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert len(others) == len(gradients)
    for left, right in zip(others, gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-7, atol=1e-10)
