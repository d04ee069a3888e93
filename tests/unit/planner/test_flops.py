from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hsmn_dist.config.models import HopeConfig
from hsmn_dist.models.build import build_model
from hsmn_dist.models.contract import cross_entropy
from hsmn_dist.planner.flops import Lengths, forward_flops
from hsmn_dist.planner.traced_parts import _traced, chain_cost, mixer_cost
from hsmn_dist.training.activation_checkpointing import checkpoint_blocks
from tests.support.planner import MODELS, full_batch

LENGTHS = Lengths(61, 23)
KNOWN = {
    **MODELS,
    "hope_linear_small": HopeConfig(vocab_size=70, d_model=32, num_layers=2, num_heads=2, mixer="linear"),
}


def counted(name: str, policy: str = "none", backward: bool = False) -> float:
    """FLOPs per example as torch counts them."""
    torch.manual_seed(0)
    model = build_model(KNOWN[name])
    checkpoint_blocks(model, policy)  # type: ignore[arg-type]
    batch = full_batch(LENGTHS.context_tokens, LENGTHS.target_tokens)
    if name == "hope_linear_small":
        batch.context_ids %= 70
        batch.target_ids %= 70
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = model(batch, target_loss=cross_entropy)
        if backward:
            output.nll.sum().backward()
    return counter.get_total_flops() / batch.target_ids.shape[0]


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_forward_flops_equal_what_torch_counts(name: str) -> None:
    assert forward_flops(KNOWN[name], LENGTHS).total == counted(name)


@pytest.mark.parametrize("name", ["hsmn", "hope"])
@pytest.mark.parametrize("policy", ["none", "every_block", "every_second_block"])
def test_training_flops_are_those_of_forward_backward_and_recomputation(name: str, policy: str) -> None:
    # A backward pass needs no gradient of the first layer's input and so is a little less than twice the forward.
    predicted = forward_flops(KNOWN[name], LENGTHS).training(policy)
    assert counted(name, policy, backward=True) == pytest.approx(predicted, rel=0.03)


def test_a_short_context_still_pays_for_its_smallest_number_of_chunks() -> None:
    config = MODELS["hsmn"]
    assert forward_flops(config, Lengths(1, 8)).total < forward_flops(config, Lengths(40, 8)).total


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hope_self_modifying", "hope_linear", "hope_chain"])
def test_long_rows_are_extended_from_short_ones_without_error(name: str) -> None:
    config = MODELS[name]
    assert isinstance(config, HopeConfig)
    step, count = {"hope_self_modifying": (64, 6), "hope_linear": (16, 14), "hope_chain": (64, 7)}[name]
    for tokens in (count * step, count * step + 5):
        if name == "hope_chain":
            assert chain_cost(config, 0, tokens, 4) == _traced(config, 0, tokens, 4)
        else:
            assert mixer_cost(config, tokens, 4) == _traced(config, None, tokens, 4)
