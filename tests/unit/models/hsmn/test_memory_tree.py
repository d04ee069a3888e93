from __future__ import annotations

import pytest
import torch

from hsmn_dist.models.hsmn import reference
from hsmn_dist.models.hsmn.memory_tree import Aggregator, node_layout
from hsmn_dist.models.layers.low_rank import LowRankLinear
from tests.support.hsmn_models import assert_gradients_close, gradients, tiny_model


def reference_nodes(model, leaves):
    return reference.tree_of(model, [reference.Node(leaf, 0, i, i + 1, True) for i, leaf in enumerate(leaves)])


@pytest.mark.parametrize("num_leaves", [1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 33])
def test_tree_equals_one_node_at_a_time_in_values_and_gradients(num_leaves):
    model = tiny_model()
    leaves = torch.randn(1, num_leaves, 8, dtype=torch.float64, requires_grad=True)
    has_tokens = torch.ones(1, num_leaves, dtype=torch.bool)
    tree = model.tree(leaves, has_tokens, torch.tensor([num_leaves]))
    nodes = reference_nodes(model, leaves[0].unbind())
    expected = torch.stack([node.value for node in nodes])
    torch.testing.assert_close(tree.values[0], expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(expected)
    ours = gradients(model, (tree.values[0] * weight).sum())
    leaf_gradient = leaves.grad.clone()
    leaves.grad = None
    assert_gradients_close(ours, gradients(model, (expected * weight).sum()))
    torch.testing.assert_close(leaf_gradient, leaves.grad)


@pytest.mark.parametrize("num_leaves", [1, 2, 3, 5, 9, 15, 33, 64, 100])
def test_every_node_is_stored_once_and_spans_are_the_union_of_the_children(num_leaves):
    layout = node_layout(num_leaves)
    assert layout.num_nodes == 2 * num_leaves - 1
    spans = list(zip(layout.level, layout.first_leaf, layout.last_leaf, strict=True))
    assert len(set(spans)) == len({span[1:] for span in spans}) == len(spans)
    assert max(layout.level) == (num_leaves - 1).bit_length()
    known = {(first, last) for _, first, last in spans}
    for level, first, last in spans:
        if level:
            middle = first + (1 << (level - 1))
            assert (first, middle) in known and (middle, last) in known
    assert (0, num_leaves) in known


def test_layout_equals_the_reference_tree():
    model = tiny_model()
    for num_leaves in (1, 2, 3, 6, 11, 13):
        nodes = reference_nodes(model, list(torch.randn(num_leaves, 8, dtype=torch.float64)))
        layout = node_layout(num_leaves)
        assert tuple(node.level for node in nodes) == layout.level
        assert tuple(node.first for node in nodes) == layout.first_leaf
        assert tuple(node.last for node in nodes) == layout.last_leaf


def test_each_example_gets_the_tree_that_it_would_have_alone():
    model = tiny_model()
    counts = torch.tensor([13, 1, 2, 7, 8, 12])
    leaves = torch.randn(6, 13, 8, dtype=torch.float64)
    has_tokens = torch.arange(13) < counts[:, None]
    has_tokens[2, 1] = False  # a chunk of padding alone
    tree = model.tree(leaves, has_tokens, counts)
    for index, count in enumerate(counts.tolist()):
        alone = model.tree(
            leaves[index : index + 1, :count], has_tokens[index : index + 1, :count], counts[index : index + 1]
        )
        assert int(tree.exists[index].sum()) == 2 * count - 1
        torch.testing.assert_close(tree.values[index][tree.exists[index]], alone.values[0], rtol=1e-12, atol=1e-12)
        assert torch.equal(tree.is_valid[index][tree.exists[index]], alone.is_valid[0])


def test_numbers_of_leaves_that_are_not_owned_cannot_be_seen():
    model = tiny_model()
    leaves = torch.randn(1, 9, 8, dtype=torch.float64)
    other = leaves.clone()
    other[:, 5:] = float("nan")
    count = torch.tensor([5])
    has_tokens = torch.arange(9) < 5
    first, second = (model.tree(x, has_tokens[None], count) for x in (leaves, other))
    assert torch.equal(first.values[first.exists], second.values[second.exists])


def test_one_aggregator_call_for_each_level(monkeypatch):
    model = tiny_model()
    calls = []
    forward = Aggregator.forward
    monkeypatch.setattr(Aggregator, "forward", lambda self, pairs: calls.append(pairs.shape) or forward(self, pairs))
    model.tree(torch.randn(3, 21, 8).double(), torch.ones(3, 21, dtype=torch.bool), torch.tensor([21, 4, 9]))
    assert len(calls) == 5


def test_low_rank_map_equals_the_product_of_its_factors():
    torch.manual_seed(0)
    low_rank = LowRankLinear(10, 7, 3).double()
    x = torch.randn(4, 10, dtype=torch.float64)
    dense = x @ (low_rank.second.weight @ low_rank.first.weight).T + low_rank.second.bias
    torch.testing.assert_close(low_rank(x), dense, rtol=1e-13, atol=1e-13)
