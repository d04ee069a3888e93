from __future__ import annotations

import pytest
import torch

from hsmn_dist.config.models import PruningConfig
from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.models import pruning
from tests.support.hsmn_models import tiny_model

GRADUAL = PruningConfig(schedule="gradual", sparsity=0.8, begin_step=10, end_step=110, every_steps=20)
CONSTANT = PruningConfig(schedule="constant", sparsity=0.5, begin_step=3, every_steps=4)


def test_gradual_schedule_is_the_cubic_ramp():
    assert [pruning.sparsity_at_step(GRADUAL, step) for step in (0, 9, 10)] == [0.0, 0.0, 0.0]
    assert pruning.sparsity_at_step(GRADUAL, 60) == pytest.approx(0.8 * (1 - 0.5**3))
    assert pruning.sparsity_at_step(GRADUAL, 110) == pruning.sparsity_at_step(GRADUAL, 9999) == 0.8


def test_constant_schedule_begins_at_its_step_and_is_recomputed():
    assert [pruning.sparsity_at_step(CONSTANT, step) for step in (2, 3, 50)] == [0.0, 0.5, 0.5]
    assert [step for step in range(14) if pruning.is_mask_step(CONSTANT, step)] == [3, 7, 11]
    assert not any(pruning.is_mask_step(PruningConfig(), step) for step in range(300))


def test_mask_step_is_the_last_step_with_a_new_mask():
    for config in (CONSTANT, GRADUAL):
        last = None
        for step in range(200):
            last = step if pruning.is_mask_step(config, step) else last
            assert pruning.mask_step(config, step) == last


@pytest.mark.parametrize("shape", [(8, 8), (7, 13), (1, 1), (64, 33)])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 1.0])
def test_exactly_the_smallest_weights_go(shape, sparsity):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    mask = pruning.compute_mask(weight, sparsity)
    assert int((~mask).sum()) == round(sparsity * weight.numel())
    if mask.any() and not mask.all():
        assert weight.abs()[~mask].max() <= weight.abs()[mask].min()


def test_ties_fall_by_position_and_not_all_at_once():
    assert pruning.compute_mask(torch.ones(2, 4), 0.5).tolist() == [[False] * 4, [True] * 4]


def test_two_four_keeps_the_two_largest_of_every_four():
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0, 0.1, 0.2, 0.3, -0.4, 9.0]])
    expected = [[False, True, False, True, False, False, True, True, True]]
    assert pruning.compute_mask(weight, 0.5, "2:4").tolist() == expected
    assert pruning.is_two_four(weight * pruning.compute_mask(weight, 0.5, "2:4"))
    assert not pruning.is_two_four(weight)


def test_two_four_at_half_way_prunes_the_cheapest_groups():
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0, 0.1, 0.2, 0.3, -0.4]])
    assert pruning.compute_mask(weight, 0.25, "2:4").tolist() == [[True] * 4 + [False, False, True, True]]
    assert pruning.compute_mask(torch.randn(6, 3), 0.5, "2:4").all()


def test_two_four_equals_a_loop_over_groups():
    torch.manual_seed(0)
    weight = torch.randn(9, 18)
    mask = pruning.compute_mask(weight, 0.5, "2:4")
    for row in range(9):
        for start in range(0, 16, 4):
            group = weight[row, start : start + 4].abs()
            kept = {start + int(i) for i in group.topk(2).indices}
            assert kept == {start + int(i) for i in mask[row, start : start + 4].nonzero()}


def test_sparsity_after_step_k_equals_the_schedule_for_the_aggregator_too():
    model = tiny_model()
    names = model.prunable_parameters()
    assert sum(name.startswith("tree.aggregator") for name in names) == 4
    assert {"compressor.weight", "decompressor.weight", "head.weight"} <= set(names)
    assert "head.weight" not in tiny_model(ties_embeddings=True).prunable_parameters()
    parameters = dict(model.named_parameters())
    for step in range(10, 130, 20):
        pruning.apply_masks(model, pruning.compute_masks(parameters, names, GRADUAL, step))
        for name, share in pruning.measured_sparsity(parameters, names).items():
            assert share == pytest.approx(pruning.sparsity_at_step(GRADUAL, step), abs=0.5 / parameters[name].numel())


def test_impossible_sparsity_is_refused():
    with pytest.raises(ModelError, match=r"sparsity of 1\.5"):
        pruning.compute_mask(torch.ones(2, 2), 1.5)


@pytest.mark.parametrize("structure", ["unstructured", "2:4"])
@pytest.mark.parametrize("sparsity", [0.0, 0.17, 0.5])
@pytest.mark.parametrize("shape", [(8, 8), (7, 13), (3, 2), (64, 33)])
def test_expected_zeros_are_those_of_the_mask(shape, sparsity, structure):
    mask = pruning.compute_mask(torch.randn(shape), sparsity, structure)
    assert pruning.expected_zeros(shape, sparsity, structure) == int((~mask).sum())


def test_sparse_kernels_are_refused_off_the_gpu_and_take_whole_tiles_of_two_of_four():
    model = tiny_model()
    with pytest.raises(ModelError, match="float64 on cpu") as error:
        pruning.use_sparse_kernels(model)
    assert error.value.allowed and error.value.action
    assert all(not parameter.is_sparse for parameter in model.parameters())
    weight = torch.randn(64, 128)
    assert not pruning.takes_sparse_kernels(weight)
    weight *= pruning.compute_mask(weight, 0.5, "2:4")
    assert pruning.takes_sparse_kernels(weight) and not pruning.takes_sparse_kernels(weight[:, :96])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with sparse tensor cores")
def test_sparse_kernels_compute_what_the_dense_matrix_computes():
    model = tiny_model(d_model=64, d_compressed=64, d_aggregator=64, aggregator_rank=64, vocab_size=128)
    for name in model.prunable_parameters():
        weight = model.get_parameter(name).data
        weight *= pruning.compute_mask(weight, 0.5, "2:4")
    inputs = torch.randn(3, 64, device="cuda", dtype=torch.bfloat16)
    model.to("cuda", torch.bfloat16)
    with torch.no_grad():
        dense = model.compressor(inputs)
        assert pruning.use_sparse_kernels(model) == model.prunable_parameters()
        torch.testing.assert_close(model.compressor(inputs), dense, rtol=2e-2, atol=2e-2)
