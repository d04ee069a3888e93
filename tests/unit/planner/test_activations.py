from __future__ import annotations

from typing import Any

import pytest
import torch

from hsmn_dist.config.models import HsmnConfig
from hsmn_dist.models.build import build_model
from hsmn_dist.models.contract import cross_entropy
from hsmn_dist.planner.activations import Storage, activations
from hsmn_dist.planner.flops import Lengths
from tests.support.planner import MODELS, full_batch

LENGTHS = Lengths(121, 32)


def saved_bytes(name: str, dtype: torch.dtype) -> float:
    """Bytes per example of the distinct storages that autograd keeps, parameters left out."""
    torch.manual_seed(0)
    model = build_model(MODELS[name]).to(dtype)
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # held, so that its address is not used again
        return tensor

    batch = full_batch(LENGTHS.context_tokens, LENGTHS.target_tokens)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(batch, target_loss=cross_entropy)
    assert output.nll is not None
    return sum(storage.nbytes() for storage in kept.values()) / batch.target_ids.shape[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_kept_bytes_are_within_ten_percent_of_what_autograd_saves(name: str, dtype: torch.dtype) -> None:
    config = MODELS[name]
    predicted = activations(config, LENGTHS, Storage(dtype.itemsize, is_gpu=False))
    log_softmax = LENGTHS.target_tokens * config.vocab_size * 4
    shared = predicted.shared * len(predicted.blocks) / 2  # two examples
    total = sum(predicted.blocks) + predicted.outside + log_softmax + shared
    assert total == pytest.approx(saved_bytes(name, dtype), rel=0.10)


def test_recomputing_keeps_inputs_and_one_block() -> None:
    kept = activations(MODELS["hope"], LENGTHS, Storage(4, is_gpu=False))
    whole, halves, least = (kept.peak(policy, 3) for policy in ("none", "every_second_block", "every_block"))
    assert whole > halves > least
    assert least == pytest.approx(
        3 * (sum(kept.block_inputs) + kept.outside)
        + max(3 * kept.logits, 3 * (kept.blocks[0] + kept.working) + kept.shared)
    )


def test_a_gpu_keeps_less_for_norms_in_half_precision() -> None:
    cpu, gpu = (sum(activations(MODELS["hope"], LENGTHS, Storage(2, is_gpu)).blocks) for is_gpu in (False, True))
    assert gpu < cpu


@pytest.mark.parametrize("is_gpu", [False, True])
@pytest.mark.parametrize("element", [4, 2])
def test_a_dropout_mask_takes_a_byte_for_each_element(element: int, is_gpu: bool) -> None:
    config = MODELS["hsmn_dropout"]
    assert isinstance(config, HsmnConfig)
    without = config.model_copy(update={"decoder_dropout": 0.0})
    kept, bare = (activations(one, LENGTHS, Storage(element, is_gpu)) for one in (config, without))
    difference = sum(kept.blocks) + kept.outside - sum(bare.blocks) - bare.outside
    assert difference == LENGTHS.target_tokens * config.d_model * (3 * config.num_decoder_layers + 1)
