"""HSMN against its reference (float64), and against itself: alone or in a batch, in windows, token by token."""

from __future__ import annotations

import pytest
import torch

from hsmn_dist.models.contract import ModelInput, cross_entropy
from hsmn_dist.models.hsmn import reference
from tests.support.hsmn_models import assert_gradients_close, batch, gradients, row, tiny_model

VARIANTS = [
    {},
    {"ties_embeddings": True},
    {"uses_level_embedding": False},
    {"norm_placement": "post"},
    {"activation": "gelu", "attention_span_tokens": 3},
    {"num_encoder_layers": 1, "chunk_stride": 6, "min_chunks": 3},
    {"encoder_group_chunks": 2},
    {"encoder_group_chunks": 2, "encoder_recompute": "sublayers"},
    {"encoder_group_chunks": 2, "encoder_recompute": "attention"},
    {"encoder_group_chunks": 2, "encoder_recompute": "none"},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: "-".join(map(str, changes.values())) or "default")
def test_model_equals_reference_in_values_and_gradients(changes):
    model = tiny_model(**changes)
    inputs = batch([17, 0, 1, 7, 13], [4, 3, 5, 1, 2])
    logits = model(inputs).logits
    expected_loss = torch.zeros((), dtype=torch.float64)
    for index in range(5):
        one = row(inputs, index)
        expected = reference.logits_of(model, one.context_ids[0].tolist(), one.target_ids[0].tolist())
        torch.testing.assert_close(logits[index, : len(expected)], expected, rtol=1e-11, atol=1e-11)
        expected_loss = expected_loss + torch.nn.functional.cross_entropy(expected, one.target_ids[0], reduction="sum")
    ours = gradients(model, model(inputs, target_loss=float64_loss).nll.sum())
    theirs = gradients(model, expected_loss)
    assert_gradients_close(ours, theirs)


def float64_loss(logits, labels, rows, positions):
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


@pytest.mark.parametrize("num_tokens", [0, 1, 5, 6, 7, 9, 10, 24, 25, 50, 51])
def test_every_context_length_equals_reference(num_tokens):
    model = tiny_model(seed=num_tokens)
    inputs = batch([num_tokens], [3], seed=num_tokens)
    expected = reference.logits_of(model, inputs.context_ids[0].tolist(), inputs.target_ids[0].tolist())
    torch.testing.assert_close(model(inputs).logits[0], expected, rtol=1e-11, atol=1e-11)


def test_an_example_in_a_batch_equals_the_example_alone():
    model = tiny_model()
    inputs = batch([40, 3, 0, 17, 29, 6], [9, 4, 6, 2, 9, 1])
    together = model(inputs, target_loss=float64_loss).nll
    for index in range(6):
        alone = model(row(inputs, index), target_loss=float64_loss).nll[0]
        torch.testing.assert_close(together[index, : len(alone)], alone, rtol=1e-12, atol=1e-12)


def test_gradients_of_a_batch_are_the_sum_of_those_alone():
    model = tiny_model()
    inputs = batch([40, 3, 0, 17], [9, 4, 6, 2])
    together = gradients(model, model(inputs, target_loss=float64_loss).nll.sum())
    alone = [gradients(model, model(row(inputs, i), target_loss=float64_loss).nll.sum()) for i in range(4)]
    assert_gradients_close(together, {name: sum(one[name] for one in alone) for name in together})


def test_padding_content_changes_neither_logits_nor_gradients():
    model = tiny_model()
    inputs = batch([20, 4], [6, 3])
    noise = torch.randint(4, 31, inputs.context_ids.shape)
    other = ModelInput(
        torch.where(inputs.context_mask, inputs.context_ids, noise),
        inputs.context_mask,
        torch.where(inputs.loss_mask, inputs.target_ids, 17),
        inputs.loss_mask,
    )
    first = model(inputs, target_loss=float64_loss).nll
    second = model(other, target_loss=float64_loss).nll
    assert torch.equal(first, second)
    before, after = gradients(model, first.sum()), gradients(model, second.sum())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_trailing_padding_changes_nothing():
    model = tiny_model()
    inputs = batch([20, 4], [6, 3])
    wider = ModelInput(
        torch.nn.functional.pad(inputs.context_ids, (0, 13)),
        torch.nn.functional.pad(inputs.context_mask, (0, 13)),
        torch.nn.functional.pad(inputs.target_ids, (0, 2)),
        torch.nn.functional.pad(inputs.loss_mask, (0, 2)),
    )
    narrow = model(inputs, target_loss=float64_loss).nll
    torch.testing.assert_close(model(wider, target_loss=float64_loss).nll[:, :6], narrow, rtol=1e-12, atol=1e-12)


def test_a_target_position_does_not_depend_on_later_targets():
    model = tiny_model()
    inputs = batch([20, 9], [12, 12])
    logits = model(inputs).logits
    for position in range(12):
        changed = inputs.target_ids.clone()
        changed[:, position:] = (changed[:, position:] + 5) % 31
        other = ModelInput(inputs.context_ids, inputs.context_mask, changed, inputs.loss_mask)
        assert torch.equal(model(other).logits[:, : position + 1], logits[:, : position + 1])


def test_a_row_does_not_depend_on_its_neighbours():
    model = tiny_model()
    inputs = batch([20, 20, 20], [5, 5, 5])
    other = ModelInput(inputs.context_ids.clone(), inputs.context_mask, inputs.target_ids.clone(), inputs.loss_mask)
    other.context_ids[1] = other.context_ids[1].flip(0)
    other.target_ids[1] = other.target_ids[1].flip(0)
    first, second = model(inputs).logits, model(other).logits
    assert torch.equal(first[[0, 2]], second[[0, 2]])
    assert not torch.equal(first[1], second[1])


@pytest.mark.parametrize("window_size", [1, 3, 4, 64])
@pytest.mark.parametrize("span", [0, 3, 5])
def test_windows_equal_the_single_pass_in_values_and_gradients(window_size, span):
    model = tiny_model(window_size=window_size, attention_span_tokens=span)
    inputs = batch([20, 0, 9], [13, 7, 2])
    whole = model(inputs).logits
    torch.testing.assert_close(model.forward_windows(inputs).logits, whole, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_windows(inputs).logits, whole.detach(), rtol=1e-12, atol=1e-12)
    single = gradients(model, model(inputs, target_loss=float64_loss).nll.sum())
    windowed = gradients(model, model.forward_windows(inputs, target_loss=float64_loss).nll.sum())
    assert_gradients_close(windowed, single)


@pytest.mark.parametrize("span", [0, 3, 70])
def test_cached_generation_equals_the_full_pass(span):
    model = tiny_model(attention_span_tokens=span, max_target_tokens=200)
    inputs = batch([20, 0, 9], [150, 150, 150])
    full = model(inputs).logits
    with torch.no_grad():
        logits, state = model.start(inputs.context_ids, inputs.context_mask)
        for position in range(150):
            torch.testing.assert_close(logits, full[:, position].detach(), rtol=1e-11, atol=1e-11)
            logits, state = model.advance(inputs.target_ids[:, position], state)


def test_a_forked_state_goes_on_in_two_ways():
    model = tiny_model()
    inputs = batch([20], [2])
    with torch.no_grad():
        _, state = model.start(inputs.context_ids, inputs.context_mask)
        branch = state.fork()
        left, state = model.advance(torch.tensor([7]), state)
        right, _ = model.advance(torch.tensor([9]), branch)
        again = model(ModelInput(inputs.context_ids, inputs.context_mask, torch.tensor([[7, 4]]), inputs.loss_mask))
        other = model(ModelInput(inputs.context_ids, inputs.context_mask, torch.tensor([[9, 4]]), inputs.loss_mask))
    torch.testing.assert_close(left, again.logits[:, 1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(right, other.logits[:, 1], rtol=1e-12, atol=1e-12)


def test_losses_are_those_of_the_logits_at_scored_positions_only():
    model = tiny_model()
    inputs = batch([20, 9], [6, 3])
    inputs.loss_mask[0, 2] = False
    nll = model(inputs, target_loss=cross_entropy).nll
    expected = torch.nn.functional.cross_entropy(
        model(inputs).logits.transpose(1, 2), inputs.target_ids, reduction="none"
    )
    torch.testing.assert_close(nll, (expected * inputs.loss_mask).float())
    assert torch.equal(nll == 0, ~inputs.loss_mask)


def test_gradient_reaches_every_parameter():
    for changes in ({}, {"ties_embeddings": True}):
        model = tiny_model(max_target_tokens=7, **changes)
        inputs = batch([40, 33], [7, 7])
        for name, gradient in gradients(model, model(inputs, target_loss=cross_entropy).nll.sum()).items():
            assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0, name


@pytest.mark.parametrize("lengths", [[0, 0], [1, 0], [5, 3]])
def test_rows_without_anything_to_read_or_score_give_finite_gradients(lengths):
    model = tiny_model()
    inputs = batch(lengths, [4, 4])
    inputs.loss_mask[:] = False
    output = model(inputs, target_loss=cross_entropy)
    assert torch.equal(output.nll, torch.zeros(2, 4))
    for name, gradient in gradients(model, output.nll.sum()).items():
        assert torch.equal(gradient, torch.zeros_like(gradient)), name


def test_empty_contexts_give_finite_losses_and_gradients():
    model = tiny_model()
    inputs = batch([0, 0], [4, 4])
    output = model(inputs, target_loss=cross_entropy)
    found = gradients(model, output.nll.sum())
    assert torch.isfinite(output.nll).all()
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    assert found["compressor.weight"].abs().sum() == 0
