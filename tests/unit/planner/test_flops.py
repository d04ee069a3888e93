from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hsmn_dist.config.models import HopeConfig
from hsmn_dist.foundation.errors import PlanError
from hsmn_dist.models.build import build_model
from hsmn_dist.models.contract import cross_entropy
from hsmn_dist.planner.flops import Lengths, forward_flops
from hsmn_dist.training.activation_checkpointing import checkpoint_blocks
from tests.support.planner import MODELS, full_batch

LENGTHS = Lengths(61, 23)
KNOWN = {**MODELS, "hope_linear": HopeConfig(vocab_size=70, d_model=32, num_layers=2, num_heads=2, mixer="linear")}


def counted(name: str, policy: str = "none", backward: bool = False) -> float:
    """FLOPs per example as torch counts them."""
    torch.manual_seed(0)
    model = build_model(KNOWN[name])
    checkpoint_blocks(model, policy)  # type: ignore[arg-type]
    batch = full_batch(LENGTHS.context_tokens, LENGTHS.target_tokens)
    if name == "hope_linear":
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


def test_a_variant_without_a_formula_is_refused_by_name() -> None:
    with pytest.raises(PlanError, match=r"model.mixer = 'self_modifying'"):
        forward_flops(HopeConfig(mixer="self_modifying"), LENGTHS)
