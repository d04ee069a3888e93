"""The closed form of a chunk of memory writes against the token loop, all memories, both skips, float64."""

import itertools

import pytest
import torch

from hsmn_dist.models.hope.neural_memory import (
    ChunkInputs,
    MemoryShape,
    MemoryWeights,
    UpdateRule,
    gelu_pair,
    write_chunk,
)
from hsmn_dist.models.hope.reference import Memory, gated_delta_steps, inner_loss, recall, titans_steps

BATCH, HEADS, WIDTH = 2, 2, 3
MLP = MemoryShape(num_vectors=4, num_scalars=2, width=WIDTH, hidden=5)
MATRIX = MemoryShape(num_vectors=4, num_scalars=2, width=WIDTH, hidden=0)


def _weights(shape, generator):
    def draw(*size):
        return 0.6 * torch.randn(BATCH, HEADS, *size, generator=generator, dtype=torch.float64)

    inner = draw(shape.num_rows, WIDTH)
    if not shape.hidden:
        return MemoryWeights(inner, None, None)
    return MemoryWeights(inner, draw(shape.num_vectors, WIDTH, shape.hidden), draw(shape.num_scalars, shape.hidden))


def _chunk(tokens, generator):
    def draw(*size):
        return torch.randn(BATCH, HEADS, tokens, *size, generator=generator, dtype=torch.float64)

    unit = torch.nn.functional.normalize
    return ChunkInputs(
        unit(draw(WIDTH), dim=-1),
        draw(WIDTH),
        0.05 + 0.3 * torch.sigmoid(draw()),
        0.5 + 0.5 * torch.sigmoid(draw()),
        unit(draw(WIDTH), dim=-1),
    )


def _memories(weights, shape, b, h):
    """The six memories of one head as the reference takes them."""
    inner, size = weights.inner[b, h], shape.hidden
    if not size:
        vectors = [Memory(None, None, inner[x * WIDTH : (x + 1) * WIDTH]) for x in range(shape.num_vectors)]
        first = shape.num_vectors * WIDTH
        return vectors + [Memory(None, None, inner[first + y : first + y + 1]) for y in range(shape.num_scalars)]
    found = []
    for x in range(shape.num_vectors):
        found.append(Memory(weights.vectors[b, h, x], inner[x * size : (x + 1) * size], None))
    for y in range(shape.num_scalars):
        x = shape.num_vectors + y
        skip = inner[shape.num_hidden_rows + y][None]
        found.append(Memory(weights.scalars[b, h, y][None], inner[x * size : (x + 1) * size], skip))
    return found


def _reference(start, now, momentum, shape, rule, chunk):
    """Reads of memory 0, and all weights and momenta after the chunk, flat, in `_memories` order."""
    reads, after, buffers = [], [], []
    for b, h in itertools.product(range(BATCH), range(HEADS)):
        fields = (chunk.key, chunk.value, chunk.rate, chunk.retention, chunk.query)
        tokens = [tuple(f[b, h, t] for f in fields) for t in range(chunk.key.shape[2])]
        olds = [None] * 6 if momentum is None else [m.tensors() for m in _memories(momentum, shape, b, h)]
        pairs = zip(_memories(start, shape, b, h), _memories(now, shape, b, h), olds, strict=True)
        for index, (first, current, old) in enumerate(pairs):
            read, last, buffer = titans_steps(
                first,
                current,
                old,
                tokens,
                objective=rule.objective,
                uses_delta=rule.uses_delta,
                beta=rule.momentum,
                gradient_at_start=bool(shape.hidden),
            )
            if index == 0:
                reads.append(read)
            after.extend(last.tensors())
            buffers.extend(buffer)
    return torch.stack(reads).reshape(BATCH, HEADS, -1, WIDTH), after, buffers


def _flat(weights, shape):
    return [
        w
        for b, h in itertools.product(range(BATCH), range(HEADS))
        for memory in _memories(weights, shape, b, h)
        for w in memory.tensors()
    ]


def _close(found, expected, tolerance=1e-11):
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


RULES = [
    UpdateRule(objective=objective, uses_delta=delta, momentum=beta)
    for objective, delta, beta in itertools.product(("dot", "half_l2", "l2"), (True, False), (0.0, 0.9))
]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.objective}-delta{r.uses_delta:d}-beta{r.momentum}")
def test_three_ragged_chunks_in_a_row_equal_the_token_loop_for_all_six_memories(rule):
    generator = torch.Generator().manual_seed(1)
    weights, momentum = _weights(MLP, generator), None
    expected_weights, expected_momentum = weights, None
    for tokens in (7, 5, 1):
        chunk = _chunk(tokens, generator)
        reads, after, buffer = write_chunk(weights, weights, momentum, MLP, rule, chunk)
        wanted, flat, buffers = _reference(weights, weights, momentum, MLP, rule, chunk)
        _close([reads], [wanted])
        _close(_flat(after, MLP), flat)
        if rule.momentum:
            _close(_flat(buffer, MLP), buffers)
        weights, momentum = after, buffer
    assert expected_weights is not weights and expected_momentum is None


@pytest.mark.parametrize("rule", [RULES[0], RULES[9], RULES[8]], ids=["dot", "l2-beta", "l2"])
def test_gradients_of_the_closed_form_equal_those_of_the_token_loop(rule):
    generator = torch.Generator().manual_seed(2)
    weights, momentum, chunk = _weights(MLP, generator), _weights(MLP, generator), _chunk(6, generator)
    if not rule.momentum:
        momentum = None
    leaves = [*weights.tensors(), chunk.key, chunk.value, chunk.rate, chunk.retention, chunk.query]
    for leaf in leaves:
        leaf.requires_grad_()

    def scalar(reads, flat):
        seeds = torch.Generator().manual_seed(3)
        return sum((t * torch.randn(t.shape, generator=seeds, dtype=t.dtype)).sum() for t in [reads, *flat])

    reads, after, _ = write_chunk(weights, weights, momentum, MLP, rule, chunk)
    given = torch.autograd.grad(scalar(reads, _flat(after, MLP)), leaves)
    wanted_reads, flat, _ = _reference(weights, weights, momentum, MLP, rule, chunk)
    wanted = torch.autograd.grad(scalar(wanted_reads, flat), leaves)
    _close(given, wanted, 1e-9)
    assert all(g.abs().max() > 0 for g in given)


@pytest.mark.parametrize("shape", [MLP, MATRIX], ids=["mlp", "matrix"])
@pytest.mark.parametrize("objective", ["dot", "half_l2", "l2"])
def test_a_chunk_cut_in_pieces_equals_the_whole_chunk(shape, objective):
    generator = torch.Generator().manual_seed(4)
    start, chunk = _weights(shape, generator), _chunk(9, generator)
    rule = UpdateRule(objective=objective, momentum=0.7 if shape.hidden else 0.0)
    whole, end, buffer = write_chunk(start, start, None, shape, rule, chunk)
    now, momentum, reads = start, None, []
    for s in (slice(0, 2), slice(2, 8), slice(8, 9)):
        piece = ChunkInputs(*(getattr(chunk, n)[:, :, s] for n in ("key", "value", "rate", "retention", "query")))
        read, now, momentum = write_chunk(start, now, momentum, shape, rule, piece)
        reads.append(read)
    _close([torch.cat(reads, 2)], [whole])
    _close(now.tensors(), end.tensors())
    if momentum is not None:
        _close(momentum.tensors(), buffer.tensors())


@pytest.mark.parametrize("rule", [RULES[8], RULES[9]], ids=["plain", "momentum"])
def test_slots_without_a_token_change_nothing(rule):
    generator = torch.Generator().manual_seed(5)
    start, momentum, chunk = _weights(MLP, generator), _weights(MLP, generator), _chunk(8, generator)
    momentum = momentum if rule.momentum else None
    valid = torch.tensor([[True] * 5 + [False] * 3] * BATCH)
    masked = ChunkInputs(
        chunk.key,
        chunk.value,
        torch.where(valid[:, None], chunk.rate, 0.0),
        torch.where(valid[:, None], chunk.retention, 1.0),
        chunk.query,
        valid,
    )
    short = ChunkInputs(*(getattr(chunk, n)[:, :, :5] for n in ("key", "value", "rate", "retention", "query")))
    found, wanted = (write_chunk(start, start, momentum, MLP, rule, c) for c in (masked, short))
    _close([found[0][:, :, :5]], [wanted[0]])
    _close(found[1].tensors(), wanted[1].tensors())
    if rule.momentum:
        _close(found[2].tensors(), wanted[2].tensors())


@pytest.mark.parametrize(("objective", "uses_delta", "c"), [("dot", True, 1), ("half_l2", True, 2), ("l2", True, 3)])
@pytest.mark.parametrize("tokens", [1, 63, 100])
def test_matrix_memories_are_the_gated_delta_rule_in_its_three_forms_for_any_chunk(objective, uses_delta, c, tokens):
    """M (alpha I - c eta k k^T) + b eta vhat k^T with b = 1, 1, 2; targets are those of the starting weights."""
    generator = torch.Generator().manual_seed(6)
    start, chunk = _weights(MATRIX, generator), _chunk(tokens, generator)
    # The bound of T2: alpha - c eta >= -1 holds for these rates.
    rule = UpdateRule(objective=objective, uses_delta=uses_delta)
    reads, after, _ = write_chunk(start, start, None, MATRIX, rule, chunk)
    b = 2.0 if objective == "l2" else 1.0
    for row, head in itertools.product(range(BATCH), range(HEADS)):
        matrix = start.inner[row, head]
        targets = chunk.value[row, head] @ matrix.mT
        wanted, last = gated_delta_steps(
            chunk.key[row, head],
            targets * (b / c),
            chunk.query[row, head],
            c * chunk.rate[row, head],
            chunk.retention[row, head],
            matrix,
        )
        _close([reads[row, head], after.inner[row, head]], [wanted[:, :WIDTH], last], 1e-9)


def test_matrix_memories_equal_the_token_loop_with_the_gradient_at_the_current_token():
    generator = torch.Generator().manual_seed(7)
    start, chunk = _weights(MATRIX, generator), _chunk(11, generator)
    for rule in RULES:
        if rule.momentum == 0.0:
            reads, after, _ = write_chunk(start, start, None, MATRIX, rule, chunk)
            wanted, flat, _ = _reference(start, start, None, MATRIX, rule, chunk)
            _close([reads], [wanted])
            _close(_flat(after, MATRIX), flat)


def test_one_dot_step_raises_the_agreement_of_memory_and_target():
    generator = torch.Generator().manual_seed(8)
    start, chunk = _weights(MLP, generator), _chunk(1, generator)
    rule = UpdateRule(objective="dot", uses_delta=False)
    chunk.rate.fill_(1e-3)
    chunk.retention.fill_(1.0)
    _, after, _ = write_chunk(start, start, None, MLP, rule, chunk)
    for b, h in itertools.product(range(BATCH), range(HEADS)):
        pairs = zip(_memories(start, MLP, b, h), _memories(after, MLP, b, h), strict=True)
        for before, later in pairs:
            target = recall(before, chunk.value[b, h, 0])
            key = chunk.key[b, h, 0]
            assert inner_loss(later, key, target, "dot") < inner_loss(before, key, target, "dot")


def test_retention_at_its_lower_clamp_forgets_everything():
    generator = torch.Generator().manual_seed(9)
    start, chunk = _weights(MLP, generator), _chunk(6, generator)
    chunk.rate.zero_()
    chunk.retention.fill_(1e-4)
    _, after, _ = write_chunk(start, start, None, MLP, UpdateRule(), chunk)
    assert all(t.abs().max() < 1e-20 for t in after.tensors())


def test_rate_zero_and_retention_one_leave_a_static_mlp():
    generator = torch.Generator().manual_seed(10)
    start, chunk = _weights(MLP, generator), _chunk(6, generator)
    chunk.rate.zero_()
    chunk.retention.fill_(1.0)
    reads, after, _ = write_chunk(start, start, None, MLP, UpdateRule(momentum=0.9), chunk)
    _close(after.tensors(), start.tensors())
    expected = torch.stack(
        [
            torch.stack([recall(_memories(start, MLP, b, h)[0], q) for q in chunk.query[b, h]])
            for b, h in itertools.product(range(BATCH), range(HEADS))
        ]
    )
    _close([reads.flatten(0, 1)], [expected])


def test_strong_forgetting_over_a_long_chunk_stays_accurate_in_single_precision():
    generator = torch.Generator().manual_seed(11)
    start, chunk = _weights(MLP, generator), _chunk(256, generator)
    chunk.retention.fill_(0.5)
    exact = write_chunk(start, start, None, MLP, UpdateRule(), chunk)
    single = write_chunk(
        start.mapped(torch.Tensor.float),
        start.mapped(torch.Tensor.float),
        None,
        MLP,
        UpdateRule(),
        ChunkInputs(*(getattr(chunk, n).float() for n in ("key", "value", "rate", "retention", "query"))),
    )
    scale = exact[0].abs().max()
    assert (single[0].double() - exact[0]).abs().max() / scale < 1e-5


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-15), (torch.float32, 3e-7), (torch.bfloat16, 8e-3)]
)
def test_gelu_and_its_slope_are_pytorchs(dtype, tolerance):
    z = torch.cat([torch.linspace(-6, 6, 121), torch.tensor([-40.0, -13.0, 0.0, 13.0, 40.0])]).to(dtype)
    exact = z.double().requires_grad_()
    (slope,) = torch.autograd.grad(torch.nn.functional.gelu(exact).sum(), exact)
    found = gelu_pair(z)
    assert [part.dtype for part in found] == [dtype, dtype]
    torch.testing.assert_close(
        found[0].double(), torch.nn.functional.gelu(exact).detach(), rtol=tolerance, atol=tolerance
    )
    torch.testing.assert_close(found[1].double(), slope, rtol=2 * tolerance, atol=2 * tolerance)


def test_gelu_pair_has_first_and_second_derivatives():
    z = torch.linspace(-4, 4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gelu_pair, z) and torch.autograd.gradgradcheck(gelu_pair, z)
