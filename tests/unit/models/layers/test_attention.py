from __future__ import annotations

import pytest
import torch

from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.models.layers.attention import Attention, attend, causal_mask
from hsmn_dist.models.layers.feed_forward import FeedForward, GatedFeedForward
from hsmn_dist.models.layers.kv_cache import LayerCache
from hsmn_dist.models.layers.norms import RMSNorm, build_norm
from hsmn_dist.models.layers.rotary import rotary_table, rotate


def written_out(query, key, value, mask):
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1).nan_to_num(0.0)
    return weights @ value


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (7, 7), (3, 11), (65, 65)])
def test_attend_equals_the_written_softmax(num_queries, num_keys):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 5).double() for n in (num_queries, num_keys, num_keys))
    mask = torch.rand(2, 1, num_queries, num_keys) > 0.4
    torch.testing.assert_close(attend(query, key, value, mask), written_out(query, key, value, mask))


def test_a_query_that_sees_nothing_reads_zeros_with_zero_gradients():
    tensors = [torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    mask = torch.ones(2, 1, 1, 3, dtype=torch.bool)
    mask[1] = False
    read = attend(*tensors, mask)
    assert torch.equal(read[1], torch.zeros_like(read[1]))
    read.square().sum().backward()
    for tensor in tensors:
        assert torch.isfinite(tensor.grad).all()
        assert torch.equal(tensor.grad[1], torch.zeros_like(tensor.grad[1]))
        assert tensor.grad[0].abs().sum() > 0


def test_causal_mask_with_history_and_span():
    assert causal_mask(2, 4, torch.device("cpu")).tolist() == [[True, True, True, False], [True] * 4]
    assert causal_mask(2, 4, torch.device("cpu"), span=2).tolist() == [
        [False, True, True, False],
        [False, False, True, True],
    ]


@pytest.mark.parametrize("span", [0, 1, 4])
@pytest.mark.parametrize("has_gradients", [False, True])
def test_cached_pieces_equal_the_whole_sequence(span, has_gradients):
    torch.manual_seed(0)
    attention = Attention(12, 3).double()
    x = torch.randn(2, 23, 12, dtype=torch.float64)
    positions = torch.arange(23)
    with torch.set_grad_enabled(has_gradients):
        whole = attention(x, is_causal=True, span=span, rotary=rotary_table(positions, 4))
        cache, pieces, start = LayerCache(span), [], 0
        for size in (5, 1, 1, 9, 7):
            part = slice(start, start + size)
            table = rotary_table(positions[part], 4)
            pieces.append(attention(x[:, part], is_causal=True, span=span, cache=cache, rotary=table))
            start += size
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-12, atol=1e-12)


def test_a_cache_with_a_span_stays_small():
    cache = LayerCache(span=10)
    with torch.no_grad():
        for _ in range(1000):
            key, _ = cache.append(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
    assert key.shape[-2] == 10
    assert cache._key.shape[-2] <= 128


def test_rotary_scores_depend_on_the_distance_alone():
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 1, 8).double(), torch.randn(1, 1, 1, 8).double()
    scores = []
    for first in (0, 5, 100):
        tables = [rotary_table(torch.tensor([position]), 8) for position in (first + 3, first)]
        scores.append((rotate(query, tables[0]) * rotate(key, tables[1])).sum())
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores[0], scores[2], rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match="head width of 7"):
        rotary_table(torch.arange(3), 7)


def test_key_bias_would_be_a_dead_parameter_and_is_absent():
    assert Attention(8, 2).key.bias is None


def test_feed_forward_maps_are_what_they_say():
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    plain, gated = FeedForward(4, 6, "gelu"), GatedFeedForward(4, 6)
    torch.testing.assert_close(plain(x), plain.outer(torch.nn.functional.gelu(plain.inner(x))))
    torch.testing.assert_close(gated(x), gated.outer(torch.nn.functional.silu(gated.gate(x)) * gated.inner(x)))


def test_norms_are_torch_modules():
    assert type(build_norm(4)) is torch.nn.LayerNorm and type(build_norm(4, "rms")) is RMSNorm
    assert issubclass(RMSNorm, torch.nn.RMSNorm)


@pytest.mark.parametrize(("width", "heads", "d_source", "num_rows"), [(8, 2, 8, 7), (6, 3, 10, 1), (5, 1, 5, 4)])
def test_one_query_reads_rows_as_it_reads_their_keys_and_values(width, heads, d_source, num_rows):
    torch.manual_seed(0)
    attention = Attention(width, heads, d_source=d_source).double()
    x = torch.randn(3, 1, width, dtype=torch.float64, requires_grad=True)
    source = torch.randn(3, num_rows, d_source, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 1, 1, num_rows) > 0.4
    mask[..., 0] = True
    leaves, seed = [x, source, *attention.parameters()], torch.randn(3, 1, width, dtype=torch.float64)
    results = []
    for read in (attention.read_once(x, source, mask), attention(x, source, mask=mask, always_sees=True)):
        assert read.shape == (3, 1, width)
        results.append((read, *torch.autograd.grad(read, leaves, seed)))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-13)
