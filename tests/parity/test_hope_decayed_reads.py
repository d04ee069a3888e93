"""Chunk-parallel decaying memories against the token loop: values, gradients, final state, odd lengths."""

import itertools

import pytest
import torch

from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.models.hope.continuum_memory import ContinuumMemory, retentions
from hsmn_dist.models.hope.decayed_reads import ReadInputs, decayed_reads, reaches
from hsmn_dist.models.hope.reference import decayed_read_steps


def _inputs(tokens, seed=0, batch=2, heads=2, width=3, modules=4):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, key, value = (draw(batch, heads, tokens, width) for _ in range(3))
    gains = torch.softmax(draw(batch, heads, tokens, modules), -1)
    memory = draw(batch, heads, modules, width, width)
    return query, key, value, gains, torch.tensor(retentions(modules), dtype=torch.float64), memory


def _reference(query, key, value, gains, taus, memory, **options):
    rows = [
        [
            decayed_read_steps(query[b, h], key[b, h], value[b, h], gains[b, h], taus, memory[b, h], **options)
            for h in range(query.shape[1])
        ]
        for b in range(query.shape[0])
    ]
    reads = torch.stack([torch.stack([r[0] for r in row]) for row in rows])
    return reads, torch.stack([torch.stack([r[1] for r in row]) for row in rows])


@pytest.mark.parametrize("tokens", [1, 63, 100, 257])
@pytest.mark.parametrize("after", [True, False])
def test_chunks_equal_the_token_loop_in_values_gradients_and_final_state(tokens, after):
    leaves = [t.requires_grad_() for t in _inputs(tokens)]
    expected = _reference(*leaves, reads_after_write=after)
    weights = [torch.randn_like(e) for e in expected]
    wanted = torch.autograd.grad(sum((e * w).sum() for e, w in zip(expected, weights, strict=True)), leaves)
    for size in (1, 7, 64):
        query, key, value, gains, taus, memory = leaves
        inputs = ReadInputs(query, key, value, gains, taus, 1.0 - taus, reads_after_write=after)
        found = decayed_reads(inputs, memory, size, returns_memory=True)
        for left, right in zip(found, expected, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)
        given = torch.autograd.grad(sum((f * w).sum() for f, w in zip(found, weights, strict=True)), leaves)
        for left, right in zip(given, wanted, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-10)


def test_nothing_is_computed_differently_when_no_memory_comes_or_goes():
    query, key, value, gains, taus, _ = _inputs(21)
    inputs = ReadInputs(query, key, value, gains, taus, 1.0 - taus)
    with_memory, _ = decayed_reads(inputs, torch.zeros(2, 2, 4, 3, 3, dtype=torch.float64), 4, True)
    without, memory = decayed_reads(inputs, None, 4, False)
    assert memory is None
    torch.testing.assert_close(without, with_memory, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [1, 4, 32])
def test_segments_and_padding_equal_each_segment_alone(size):
    query, key, value, gains, taus, memory = _inputs(17)
    segments = torch.tensor([[0] * 5 + [1] * 3 + [2] * 9, [0] * 2 + [1] * 11 + [2] * 4])
    valid = torch.arange(17)[None] < torch.tensor([[14], [17]])
    inputs = ReadInputs(query, key, value, gains, taus, 1.0 - taus, segments, valid)
    reads, final = decayed_reads(inputs, memory, size, True)
    for b in range(2):
        for h in range(2):
            for segment in range(3):
                here = (segments[b] == segment) & valid[b]
                start = memory[b, h] if segment == 0 else None
                expected, state = decayed_read_steps(
                    query[b, h, here], key[b, h, here], value[b, h, here], gains[b, h, here], taus, start
                )
                torch.testing.assert_close(reads[b, h, here], expected, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(final[b, h], state, rtol=1e-10, atol=1e-12)


def _packed(tokens):
    """Segments and validity of two rows: up to three segments, and two; the first row ends in padding."""
    cut = tokens // 3
    segments = torch.stack([torch.arange(tokens) // (cut + 1), torch.arange(tokens) // (2 * cut + 1)])
    return segments, torch.arange(tokens)[None] < torch.tensor([[tokens - 1], [tokens]])


def _seeds(outputs):
    return [torch.sin(torch.arange(t.numel(), dtype=t.dtype)).view_as(t) for t in outputs]


CASES = [(tokens, memory, goes) for tokens in (5, 64, 150) for memory in (False, True) for goes in (False, True)]


@pytest.mark.parametrize(("tokens", "memory_comes", "memory_goes"), CASES)
@pytest.mark.parametrize("is_packed", [False, True])
def test_written_out_gradients_equal_those_of_autograd(tokens, memory_comes, memory_goes, is_packed):
    """A decay that wants a gradient itself leaves all of them to autograd: the other way through the same forward pass."""
    query, key, value, gains, taus, memory = _inputs(tokens, modules=5)
    value = torch.cat([value, value.flip(2)], -1)  # as wide as no key is
    memory = torch.cat([memory, memory.flip(3)], -1) if memory_comes else None
    segments, valid = _packed(tokens) if is_packed else (None, None)
    leaves = [t.requires_grad_() for t in (query, key, value, gains, memory) if t is not None]
    found = []
    for decays in (taus, taus.clone().requires_grad_()):
        known = reaches(tuple(taus.tolist()), torch.float64)
        inputs = ReadInputs(query, key, value, gains, decays, 1.0 - decays, segments, valid, reaches=known)
        reads, after = decayed_reads(inputs, memory, 64, memory_goes)
        outputs = [t for t in (reads, after) if t is not None]
        seeds = _seeds(outputs)
        names = _nodes(reads.grad_fn)
        assert ("_ChunkedReadsBackward" in names) is (decays is taus), names
        gradients = torch.autograd.grad(outputs, leaves, seeds, retain_graph=True)
        again = torch.autograd.grad(outputs, leaves, seeds)  # nothing that was kept is written to
        assert all(torch.equal(one, other) for one, other in zip(gradients, again, strict=True))
        found.append((outputs, gradients))
    for left, right in zip(*found, strict=True):
        for one, other in zip(left, right, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("decays_are_given", [True, False])
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(("tokens", "memory_comes", "memory_goes"), CASES)
def test_what_is_left_out_counts_as_one(tokens, memory_comes, memory_goes, is_packed, decays_are_given):
    """Without gains every module is read as it is; without decays there is one module, which keeps everything."""
    query, key, value, gains, taus, memory = _inputs(tokens, modules=4 if decays_are_given else 1)
    decays, scales = (taus, 1.0 - taus) if decays_are_given else (torch.ones_like(taus), torch.ones_like(taus))
    memory = memory if memory_comes else None
    segments, valid = _packed(tokens) if is_packed else (None, None)
    known = reaches(tuple(taus.tolist()), torch.float64) if decays_are_given else None
    leaves = [t.requires_grad_() for t in (query, key, value, memory) if t is not None]
    left_out = (None, decays, scales) if decays_are_given else (None, None, None)
    found = []
    for weights in (left_out, (torch.ones_like(gains), decays, scales)):
        inputs = ReadInputs(query, key, value, *weights, segments, valid, reaches=known)
        outputs = [t for t in decayed_reads(inputs, memory, 64, memory_goes) if t is not None]
        seeds = _seeds(outputs)
        found.append((outputs, torch.autograd.grad(outputs, leaves, seeds)))
    for left, right in zip(*found, strict=True):
        for one, other in zip(left, right, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def _nodes(node):
    """Names of a graph's nodes."""
    names, waiting = set(), [node]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in names:
            names.add(node)
            waiting += [before for before, _ in node.next_functions]
    return {type(one).__name__ for one in names}


def test_gradients_of_the_last_memory_alone():
    query, key, value, gains, taus, memory = _inputs(70)
    leaves = [t.requires_grad_() for t in (key, value, memory)]
    for start in (None, memory):
        for size in (64, 128):
            wanted = leaves if start is not None else leaves[:2]
            given = []
            for decays in (taus, taus.clone().requires_grad_()):
                inputs = ReadInputs(query, key, value, gains, decays, 1.0 - decays)
                after = decayed_reads(inputs, start, size, True)[1]
                given.append(torch.autograd.grad(after.square().sum(), wanted))
            for left, right in zip(*given, strict=True):
                torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-12)


def test_per_example_gradients_of_torch_func_equal_a_loop():
    layer, x = _layer()
    weights = dict(layer.named_parameters())

    def loss(values, row):
        return torch.func.functional_call(layer, values, (row[None],))[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    for number in range(2):
        expected = torch.autograd.grad(layer(x[number : number + 1])[0].square().sum(), list(weights.values()))
        for name, gradient in zip(weights, expected, strict=True):
            torch.testing.assert_close(found[name][number], gradient, rtol=1e-10, atol=1e-12)


def _layer(**options):
    torch.manual_seed(5)
    layer = ContinuumMemory(8, 2, 3, chunk_size=4, **options).double()
    return layer, torch.randn(2, 11, 8, dtype=torch.float64)


@pytest.mark.parametrize("options", [{}, {"corrects_bias": True}, {"reads_after_write": False}], ids=str)
def test_any_split_of_a_stream_into_calls_equals_one_call(options):
    layer, x = _layer(**options)
    whole, end = layer(x)
    for cuts in ((0, 1, 2, 11), (0, 6, 11), (0, 5, 10, 11)):
        state, parts = None, []
        for start, stop in itertools.pairwise(cuts):
            y, state = layer(x[:, start:stop], state)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(state.memory, end.memory, rtol=1e-10, atol=1e-12)
        assert torch.equal(state.num_tokens, end.num_tokens)


def test_retention_near_zero_keeps_the_last_write_alone():
    layer, x = _layer(taus=[1e-12])
    _, state = layer(x)
    _, last = layer(x[:, -1:])
    torch.testing.assert_close(state.memory, last.memory, rtol=1e-9, atol=1e-11)


def test_retention_one_never_changes_and_near_one_with_bias_correction_reads_the_mean():
    layer, x = _layer(taus=[1.0])
    state = layer(x)[1]
    assert not state.memory.any()
    layer, x = _layer(taus=[1.0 - 1e-9], corrects_bias=True)
    with torch.no_grad():
        layer.output.weight.copy_(torch.eye(8))
    y, _ = layer(x)
    query, key, value = (t.reshape(2, 11, 2, 4) for t in layer.project(x).chunk(3, -1))
    mean = torch.einsum("bthk,bthj->bhkj", key, value) / 11
    expected = torch.einsum("bhk,bhkj->bhj", query[:, -1] / 2.0, mean).reshape(2, 8)
    torch.testing.assert_close(y[:, -1], expected, rtol=1e-5, atol=1e-7)


def test_reset_inside_a_batch_row_restarts_that_row_alone():
    layer, x = _layer(corrects_bias=True)
    reset = torch.zeros(2, 11, dtype=torch.bool)
    reset[1, 7] = True
    y, state = layer(x, None, reset)
    whole, end = layer(x)
    part, after = layer(x[1:, 7:])
    torch.testing.assert_close(y[0], whole[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(y[1:, 7:], part, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state.memory[1:], after.memory, rtol=1e-10, atol=1e-12)
    assert state.num_tokens.tolist() == [11, 4] and end.num_tokens.tolist() == [11, 11]


def test_time_scales_are_log_spaced_in_half_life_from_0_01_to_0_99():
    taus = torch.tensor(retentions(5), dtype=torch.float64)
    assert float(taus[0]) == pytest.approx(0.01) and float(taus[-1]) == pytest.approx(0.99)
    half_lives = torch.log(torch.tensor(0.5, dtype=torch.float64)) / taus.log()
    ratios = half_lives[1:] / half_lives[:-1]
    torch.testing.assert_close(ratios, ratios[:1].expand(4), rtol=1e-9, atol=0)


def test_stream_of_100_000_tokens_stays_finite():
    torch.manual_seed(0)
    layer, state = ContinuumMemory(8, 2, 5), None
    with torch.no_grad():
        for _ in range(10):
            y, state = layer(torch.randn(1, 10_000, 8), state)
    assert torch.isfinite(y).all() and torch.isfinite(state.memory).all()
    assert int(state.num_tokens) == 100_000


def test_bad_sizes_are_refused():
    with pytest.raises(ModelError):
        ContinuumMemory(10, 3)
    with pytest.raises(ModelError):
        ContinuumMemory(8, 2, taus=[1.5])
    layer, x = _layer()
    with pytest.raises(ModelError):
        layer(x, layer(x[:1])[1])


@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("corrects", [True, False])
def test_carrying_slow_modules_alone_changes_nothing_beyond_the_last_bits(after, corrects):
    torch.manual_seed(0)
    layer = ContinuumMemory(8, 2, 5, chunk_size=64, reads_after_write=after, corrects_bias=corrects).double()
    x = torch.randn(2, 301, 8, dtype=torch.float64, requires_grad=True)
    reset = torch.zeros(2, 301, dtype=torch.bool)
    reset[0, 130] = reset[1, 5] = reset[1, 66] = True
    for given in (None, reset):
        fast, full = (layer(x, None, given, returns_state=wanted)[0] for wanted in (False, True))
        torch.testing.assert_close(fast, full, rtol=1e-12, atol=1e-14)
        seeds = torch.randn_like(fast)
        leaves = [x, *layer.parameters()]
        found, expected = (torch.autograd.grad((y * seeds).sum(), leaves) for y in (fast, full))
        for left, right in zip(found, expected, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)
