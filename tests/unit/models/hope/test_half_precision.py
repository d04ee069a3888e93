"""bf16 autocast and bf16 parameters on a CPU: finite, close to fp32, with gradients for every parameter."""

import pytest
import torch

from hsmn_dist.models.contract import cross_entropy
from hsmn_dist.models.hope.model import HopeModel
from tests.support.hope_models import batch, chain, small_memories, tiny_config

VARIANTS = {
    "attention": {},
    "linear": {"mixer": "linear"},
    "self_modifying": {"mixer": "self_modifying", "self_modifying": small_memories()},
    "chain": {"cms": chain()},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_half_precision_stays_close_and_keeps_its_gradients(changes):
    torch.manual_seed(0)
    model = HopeModel(tiny_config(**changes, num_layers=1))
    inputs = batch([5, 3], [9, 7])
    wanted = model(inputs, target_loss=cross_entropy).nll.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(inputs, target_loss=cross_entropy).nll
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
    found.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    model.bfloat16().zero_grad()
    found = model(inputs, target_loss=cross_entropy).nll
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0.03, atol=0.03)
    found.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    with torch.no_grad():
        logits, state = model.start(inputs.context_ids, inputs.context_mask)
        logits, state = model.advance(logits.argmax(-1), state)
    assert torch.isfinite(logits).all()
