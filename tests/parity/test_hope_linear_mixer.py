"""LinearMixer against its recurrence, one token at a time; and features that round to 0."""

import itertools

import pytest
import torch

from hsmn_dist.models.hope.mixers import LinearMixer, SequenceInfo, positive_features, running_sum
from hsmn_dist.models.hope.reference import linear_attention_steps
from hsmn_dist.models.layers.rotary import RotaryTable, rotary_table

WIDTH, HEADS, CHUNK = 8, 2, 64
LENGTHS = [1, 63, 100, 257]


def _mixer(chunk=CHUNK):
    torch.manual_seed(0)
    mixer = LinearMixer(WIDTH, HEADS, chunk).double()
    torch.nn.init.normal_(mixer.project.weight, std=0.7)
    return mixer


def _info(tokens, is_rotary, **changes):
    table = rotary_table(torch.arange(tokens), WIDTH // HEADS) if is_rotary else None
    return SequenceInfo(rotary=table, **changes)


def _loop(mixer, x, table):
    """One sequence [T, D]: outputs [T, D], and for each head its memory and its normaliser."""
    width = WIDTH // HEADS
    unturned = torch.ones(len(x), width // 2, dtype=x.dtype), torch.zeros(len(x), width // 2, dtype=x.dtype)
    cos, sin = unturned if table is None else (table.cos.to(x.dtype), table.sin.to(x.dtype))
    parts = [part.unflatten(-1, (HEADS, width)) for part in mixer.project(x).chunk(3, -1)]
    heads = [linear_attention_steps(*(part[:, head] for part in parts), cos, sin) for head in range(HEADS)]
    return mixer.output(torch.cat([head[0] for head in heads], -1)), heads


@pytest.mark.parametrize("is_rotary", [True, False], ids=["rotary", "plain"])
@pytest.mark.parametrize("returns_state", [True, False], ids=["stream", "row"])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_values_gradients_and_final_state_equal_the_recurrence(tokens, returns_state, is_rotary):
    mixer, info = _mixer(), _info(tokens, is_rotary, returns_state=returns_state)
    x = torch.randn(2, tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    y, state, _ = mixer(x, None, info)
    rows = [_loop(mixer, row, info.rotary) for row in x]
    wanted = torch.stack([row[0] for row in rows])
    torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-11)
    assert (state is not None) == returns_state
    for b, head in itertools.product(range(2), range(HEADS)) if state is not None else ():
        _, memory, normaliser = rows[b][1][head]
        torch.testing.assert_close(state.memory[b, head, 0], memory, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(state.normaliser[b, head, 0, :, 0], normaliser, rtol=1e-9, atol=1e-11)
    leaves, seeds = [x, *mixer.parameters()], torch.randn_like(y)
    given = torch.autograd.grad((y * seeds).sum(), leaves)
    expected = torch.autograd.grad((wanted * seeds).sum(), leaves)
    for left, right in zip(given, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("cuts", [[1], [63, 100], [64, 128, 256]], ids=str)
def test_a_split_stream_equals_the_recurrence(cuts):
    mixer, info = _mixer(), _info(257, True)
    x = torch.randn(1, 257, WIDTH, dtype=torch.float64)
    state, parts = None, []
    for start, stop in itertools.pairwise([0, *cuts, 257]):
        assert info.rotary is not None
        table = RotaryTable(info.rotary.cos[start:stop], info.rotary.sin[start:stop])
        y, state, _ = mixer(x[:, start:stop], state, SequenceInfo(rotary=table, returns_state=True))
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1)[0], _loop(mixer, x[0], info.rotary)[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("returns_state", [True, False], ids=["stream", "row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_features_that_round_to_zero_give_finite_reads_and_gradients(dtype, returns_state):
    """Far below 0 elu + 1 is exactly 0: a first token of such features would divide 0 by 0."""
    torch.manual_seed(0)
    mixer = LinearMixer(WIDTH, HEADS, 4)
    with torch.no_grad():
        mixer.project.weight[: 2 * WIDTH] = -50.0
        mixer.project.weight[2 * WIDTH :].normal_()
    mixer = mixer.to(dtype)
    x = (torch.rand(2, 9, WIDTH) + 0.5).to(dtype)
    x[1, 4:] *= -1.0  # beside tokens with large features
    x.requires_grad_()
    y, _, _ = mixer(x, None, SequenceInfo(returns_state=returns_state))
    y.float().sum().backward()
    assert bool(torch.isfinite(y).all()) and bool(torch.isfinite(x.grad).all())
    assert all(bool(torch.isfinite(p.grad).all()) for p in mixer.parameters())
    # Equal features weigh all values alike: the read of the first row is the mean so far.
    values = mixer.project(x)[0, :, 2 * WIDTH :].float()
    mean = values.cumsum(0) / torch.arange(1, 10)[:, None]
    expected = mixer.output(mean.to(dtype))
    torch.testing.assert_close(
        y[0].float(), expected.float(), rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-5
    )


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
def test_running_sums_by_blocks_equal_a_cumulative_sum(tokens):
    torch.manual_seed(tokens)
    x = torch.randn(2, tokens, 3, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(2, tokens, 3, dtype=torch.float64)
    found = [(total, *torch.autograd.grad(total, [x], seed)) for total in (running_sum(x, 64), x.cumsum(1))]
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_features_have_the_values_and_gradients_of_elu_plus_one(dtype):
    x = torch.tensor([-100.0, -50.0, -3.0, -1.0, -0.1, 0.0, 0.1, 1.0, 100.0], dtype=dtype, requires_grad=True)
    features = positive_features(x)
    assert type(features.grad_fn).__name__ == "_PositiveFeaturesBackward"
    seed = torch.arange(1.0, 10.0, dtype=dtype)
    wide = x.detach().double().requires_grad_()
    expected = torch.nn.functional.elu(wide) + 1.0
    close = {"rtol": 2e-2 if dtype == torch.bfloat16 else 1e-6, "atol": torch.finfo(dtype).eps}
    torch.testing.assert_close(features.double(), expected, **close)
    (given,) = torch.autograd.grad(features, [x], seed)
    (wanted,) = torch.autograd.grad(expected, [wide], seed.double())
    torch.testing.assert_close(given.double(), wanted, **close)
    assert bool((features > 0).all()) and given[:2].tolist() == [0.0, 0.0]  # held, and so without a slope
