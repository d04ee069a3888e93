"""SelfModifyingTitans against a token loop written from the reference's pieces; stability; half precision."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from hsmn_dist.config.models import SelfModifyingConfig
from hsmn_dist.models.hope.mixers import SequenceInfo
from hsmn_dist.models.hope.reference import Memory, recall, titans_steps
from hsmn_dist.models.hope.self_modifying import INITIAL_RETENTION, SMALLEST_RETENTION, SelfModifyingTitans


def _mixer(seed=0, **changes):
    torch.manual_seed(seed)
    options = {"hidden_units": 5, "chunk_tokens": 4, "memory_chunk_tokens": 4, "initial_rate": 0.1, **changes}
    mixer = SelfModifyingTitans(8, 2, SelfModifyingConfig(**{"largest_growth": 0.0, **options})).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        mixer.project.weight.mul_(3.0)
        mixer.retention_bias.fill_(2.0)
    return mixer


def _start(mixer, head):
    """The learned start of one head: vector memories, then rate and retention."""
    shape, inner = mixer.shape, mixer.initial_inner[head]
    size = shape.hidden
    if not size:
        width = shape.width
        vectors = [Memory(None, None, inner[x * width : (x + 1) * width]) for x in range(shape.num_vectors)]
        return vectors + [Memory(None, None, row[None]) for row in inner[shape.num_vectors * width :]]
    lifts = inner[: shape.num_hidden_rows].reshape(-1, size, shape.width)
    vectors = [Memory(mixer.initial_vectors[head, x], lifts[x], None) for x in range(shape.num_vectors)]
    return vectors + [
        Memory(
            mixer.initial_scalars[head, y][None], lifts[shape.num_vectors + y], inner[shape.num_hidden_rows + y][None]
        )
        for y in range(shape.num_scalars)
    ]


def _token_loop(mixer, x, chunk):
    """The whole mixer for one sequence [T, D], token by token; every memory has the same chunk size."""
    settings = mixer.settings
    padded = torch.cat([x.new_zeros(3, x.shape[1]), x])
    mixed = torch.stack([sum(mixer.convolution[j] * padded[t + 3 - j] for j in range(4)) for t in range(len(x))])
    lifted, query = mixer.project(mixed).chunk(2, -1)
    heads = []
    for head in range(mixer.num_heads):
        width = mixer.shape.width
        place = slice(head * width, (head + 1) * width)
        now = start = _start(mixer, head)
        buffers = [None] * len(start)
        reads = []
        for t in range(len(x)):
            if t % chunk == 0:
                start = now
            u, q = lifted[t, place], query[t, place]
            key = F.normalize(recall(start[1], u), dim=0)
            value = F.normalize(recall(start[2], u), dim=0)
            rate = F.softplus(recall(start[-2], u)[0] + mixer.rate_bias[head]) * settings.rate_scale
            rate = rate.clamp(max=settings.largest_rate)
            retention = torch.sigmoid(recall(start[-1], u)[0] + mixer.retention_bias[head]).clamp(
                min=SMALLEST_RETENTION
            )
            if settings.adapts_query:
                q = recall(start[3], q)
            token = [(key, value, rate, retention, F.normalize(q, dim=0))]
            rows = [
                titans_steps(
                    first,
                    current,
                    buffer,
                    token,
                    objective=settings.objective,
                    uses_delta=settings.uses_delta,
                    beta=settings.momentum,
                    gradient_at_start=settings.memory == "mlp",
                )
                for first, current, buffer in zip(start, now, buffers, strict=True)
            ]
            reads.append(rows[0][0][0])
            now, buffers = [r[1] for r in rows], [r[2] for r in rows]
        heads.append(torch.stack(reads))
    read = mixer.read_norm(torch.stack(heads, 1))  # [T, H, K]
    return mixer.output(read.flatten(1))


VARIANTS = [
    {},
    {"objective": "dot"},
    {"objective": "half_l2", "momentum": 0.9},
    {"uses_delta": False, "adapts_query": True},
    {"memory": "matrix"},
    {"memory": "matrix", "objective": "dot"},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("chunk", [1, 4])
def test_the_mixer_equals_the_token_loop_in_values_and_gradients(changes, chunk):
    mixer = _mixer(**changes, chunk_tokens=chunk, memory_chunk_tokens=chunk)
    x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    leaves = [x, *mixer.parameters()]
    y, _, _ = mixer(x, None, SequenceInfo())
    wanted = torch.stack([_token_loop(mixer, row, chunk) for row in x])
    torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-11)
    seeds = torch.randn_like(y)
    given = torch.autograd.grad((y * seeds).sum(), leaves)
    expected = torch.autograd.grad((wanted * seeds).sum(), leaves)
    for left, right in zip(given, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("sizes", [(4, 4), (2, 6), (6, 2), (1, 3), (3, 1)])
def test_causality_holds_for_equal_and_different_chunk_sizes(sizes):
    mixer = _mixer(chunk_tokens=sizes[0], memory_chunk_tokens=sizes[1], momentum=0.5)
    x = torch.randn(1, 13, 8, dtype=torch.float64)
    before = mixer(x, None, SequenceInfo())[0]
    for position in range(13):
        x[0, position] += 1.0
        after = mixer(x, None, SequenceInfo())[0]
        assert torch.equal(before[:, :position], after[:, :position])
        assert not torch.equal(before[:, position], after[:, position])
        before = after


@pytest.mark.parametrize("sizes", [(4, 4), (2, 6), (6, 2)])
def test_the_chunk_size_of_each_group_of_memories_matters_and_only_then(sizes):
    x = torch.randn(1, 13, 8, dtype=torch.float64)
    together = _mixer(chunk_tokens=4, memory_chunk_tokens=4)(x, None, SequenceInfo())[0]
    other = _mixer(chunk_tokens=sizes[0], memory_chunk_tokens=sizes[1])(x, None, SequenceInfo())[0]
    assert torch.equal(together, other) == (sizes == (4, 4))


STREAMS = [
    {},
    {"momentum": 0.9},
    {"memory": "matrix"},
    {"chunk_tokens": 8},
    {"chunk_tokens": 1, "memory_chunk_tokens": 3},
    {"chunk_tokens": 3, "memory_chunk_tokens": 1},
]


@pytest.mark.parametrize("changes", STREAMS, ids=str)
def test_a_stream_saved_in_the_middle_of_a_chunk_goes_on_as_if_uninterrupted(changes, tmp_path):
    mixer = _mixer(**{**changes, "largest_growth": 2.0})
    x = torch.randn(2, 21, 8, dtype=torch.float64)
    info = SequenceInfo(returns_state=True)
    whole, end, _ = mixer(x, None, info)
    for cuts in ([6], [1, 2, 3], [4, 8, 13], [20], range(1, 21)):
        state, parts = None, []
        for start, stop in itertools.pairwise([0, *cuts, 21]):
            y, state, _ = mixer(x[:, start:stop], state, info)
            parts.append(y)
            torch.save(state, tmp_path / "state.pt")
            state = torch.load(tmp_path / "state.pt", weights_only=False)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-11)
        for left, right in zip(state.tensors(), end.tensors(), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["random", "constant", "two tokens"])
@pytest.mark.parametrize("changes", [{}, {"initial_rate": 0.3, "momentum": 0.9}, {"memory": "matrix"}], ids=str)
def test_norms_stay_bounded_over_4096_tokens(kind, changes):
    torch.manual_seed(0)
    mixer = SelfModifyingTitans(32, 2, SelfModifyingConfig(hidden_units=16, **changes))
    torch.nn.init.normal_(mixer.project.weight, std=0.3)
    x = torch.randn(1, 4096, 32)
    if kind != "random":
        x = x[:, : 1 if kind == "constant" else 2].repeat(1, 4096 if kind == "constant" else 2048, 1)
    with torch.no_grad():
        y, state, health = mixer(x, None, SequenceInfo(returns_state=True))
    assert torch.isfinite(y).all() and y.abs().max() < 100
    initial = mixer.initial_weights(1)
    for left, right in zip(state.now.tensors(), initial.tensors(), strict=True):
        assert left.norm() <= 2.0 * right.norm() + 1e-4
    assert 0.0 < float(health["memory/self_modifying_rate"]) <= mixer.settings.largest_rate
    assert 0.0 < float(health["memory/self_modifying_retention"]) < 1.0


def test_rates_and_retentions_start_where_they_should_and_obey_the_spectral_bound():
    mixer = SelfModifyingTitans(32, 2, SelfModifyingConfig())
    _, _, health = mixer(torch.randn(1, 64, 32), None, SequenceInfo())
    assert float(health["memory/self_modifying_rate"]) == pytest.approx(0.01, rel=0.1)
    assert float(health["memory/self_modifying_retention"]) == pytest.approx(INITIAL_RETENTION, abs=1e-3)
    for objective, c in (("dot", 1), ("half_l2", 2), ("l2", 3)):
        with pytest.raises(ValueError, match="largest_rate"):
            SelfModifyingConfig(objective=objective, largest_rate=min(1.0, 1.01 / c) if c > 1 else 1.01)
    assert math.isfinite(float(health["memory/self_modifying_delta_norm"]))


def test_half_precision_parameters_and_autocast_stay_close_to_single_precision():
    torch.manual_seed(0)
    mixer = SelfModifyingTitans(32, 2, SelfModifyingConfig(hidden_units=16, chunk_tokens=8, memory_chunk_tokens=8))
    x = torch.randn(2, 40, 32)
    wanted = mixer(x, None, SequenceInfo())[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mixer(x, None, SequenceInfo())[0]
    assert (found.float() - wanted).abs().max() < 0.05 * wanted.abs().max()
    found = mixer.bfloat16()(x.bfloat16(), None, SequenceInfo())[0]
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).abs().max() < 0.1 * wanted.abs().max()
