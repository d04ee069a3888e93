"""AssociativeMemory: what is stored comes back, for its own sequence alone, the oldest goes first."""

import pytest
import torch

from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.models.hope.associative_memory import AssociativeMemory


def _filled(capacity=0):
    torch.manual_seed(0)
    memory = AssociativeMemory(d_key=32, d_value=4, capacity=capacity, sharpness=200.0)
    keys, values = torch.randn(2, 10, 32), torch.randn(2, 10, 4)
    pairs = memory.store(memory.empty(2), keys[:, :6], values[:, :6])
    return memory, memory.store(pairs, keys[:, 6:], values[:, 6:]), keys, values


def test_stored_values_come_back_for_their_keys_and_for_keys_with_noise():
    memory, pairs, keys, values = _filled()
    found, nearest = memory.retrieve(pairs, keys * 3.0)
    torch.testing.assert_close(found, values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(nearest, torch.ones(2, 10), rtol=1e-5, atol=1e-5)
    found, nearest = memory.retrieve(pairs, keys + 0.1 * torch.randn_like(keys))
    torch.testing.assert_close(found, values, rtol=1e-2, atol=1e-2)
    assert (nearest < 1).all()


def test_sequences_of_a_batch_never_share_pairs():
    memory, pairs, keys, values = _filled()
    found, _ = memory.retrieve(pairs, keys.flip(0))
    assert (found - values).abs().mean() > 0.5
    alone = memory.store(memory.empty(1), keys[:1], values[:1])
    torch.testing.assert_close(memory.retrieve(alone, keys[:1])[0], memory.retrieve(pairs, keys)[0][:1])


def test_oldest_pairs_go_first_and_an_empty_memory_answers_zero():
    memory, pairs, keys, values = _filled(capacity=4)
    assert pairs.keys.shape == (2, 4, 32)
    found, _ = memory.retrieve(pairs, keys)
    torch.testing.assert_close(found[:, 6:], values[:, 6:], rtol=1e-4, atol=1e-4)
    assert (found[:, :6] - values[:, :6]).abs().mean() > 0.5
    zeros, nearest = memory.retrieve(memory.empty(2), keys)
    assert not zeros.any() and not nearest.any()


def test_top_one_is_the_nearest_value_exactly_and_gradients_reach_what_was_stored():
    memory = AssociativeMemory(3, 2, sharpness=1.0)
    keys, values = torch.eye(3)[None].clone().requires_grad_(), torch.arange(6.0).reshape(1, 3, 2).requires_grad_()
    pairs = memory.store(memory.empty(1), keys, values)
    query = torch.tensor([[[0.1, 0.9, 0.2]]])
    assert torch.equal(memory.retrieve(pairs, query, top_k=1)[0], values[:, 1:2])
    memory.retrieve(pairs, query)[0].sum().backward()
    assert keys.grad.any() and values.grad.any()


def test_wrong_shapes_and_another_batch_size_are_refused():
    memory, pairs, keys, values = _filled()
    for call in (
        lambda: memory.store(pairs, keys[..., :5], values),
        lambda: memory.store(pairs, keys[:1], values[:1]),
        lambda: memory.retrieve(pairs, keys[:1]),
        lambda: AssociativeMemory(0, 1),
    ):
        with pytest.raises(ModelError):
            call()
