"""Token-cadence CMS against the token loop: values, gradients, ticks; stacking, health, streams."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from hsmn_dist.config.models import CmsConfig
from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.models.contract import ModelInput, cross_entropy
from hsmn_dist.models.hope import chain_walk
from hsmn_dist.models.hope.chain_memory import ChainMemory
from hsmn_dist.models.hope.level_clock import base_period, check_periods, does_tick, num_ticks, tokens_of_tick
from hsmn_dist.models.hope.memory_health import dead_levels
from hsmn_dist.models.hope.mixers import SequenceInfo
from hsmn_dist.models.hope.reference import chain_steps
from hsmn_dist.models.hope.stacking import start_from_mlp
from hsmn_dist.models.layers.feed_forward import FeedForward
from tests.support.hope_models import batch, chain, tiny_model

WIDTH = 5


def _memory(periods, seed=0, **changes):
    torch.manual_seed(seed)
    levels = [{"period": p, "hidden_units": 4 + i, "learning_rate": 0.5 + i} for i, p in enumerate(periods)]
    memory = ChainMemory(WIDTH, CmsConfig(form="chain", levels=levels, **{"largest_growth": 0.0, **changes})).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return memory


def _loop(memory, x):
    """`chain_steps` with the module's parameters, for one sequence."""
    settings = memory.settings
    count = len(memory.periods)
    if memory.learns_writes:
        values = memory.value(x)
        rates = [F.softplus(memory.rates[i]) / WIDTH if memory.periods[i] else None for i in range(count)]
    else:
        values = x.detach()
        rates = [torch.tensor(level.learning_rate / WIDTH, dtype=x.dtype) for level in settings.levels]
    return chain_steps(
        [list(memory.start(i)) for i in range(count)],
        x,
        values,
        memory.periods,
        rates,
        variant=settings.variant,
        objective=settings.objective,
        mix=memory.mix if settings.variant == "independent" else None,
        nested_rate=settings.nested_rate,
    )


CASES = [
    ((1,), {}),
    ((3, 6), {}),
    ((2, 4, 8), {"variant": "nested"}),
    ((2, 4, 0), {"variant": "independent"}),
    ((4, 0), {"objective": "dot"}),
]


@pytest.mark.parametrize("most_waiting", [16, 2])
@pytest.mark.parametrize(("periods", "changes"), CASES, ids=str)
def test_values_gradients_and_final_weights_equal_the_token_loop(periods, changes, most_waiting, monkeypatch):
    monkeypatch.setattr(chain_walk, "_MOST_WAITING", most_waiting)
    memory = _memory(periods, **changes)
    x = torch.randn(2, 13, WIDTH, dtype=torch.float64, requires_grad=True)
    y, state, _ = memory(x, None, SequenceInfo(returns_state=True))
    rows = [_loop(memory, row) for row in x]
    wanted = torch.stack([row[0] for row in rows])
    torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-12)
    for index, level in enumerate(state.levels):
        if level is None:
            continue
        for number, start in enumerate(memory.start(index)):
            for b in range(2):
                fast = start + level.change[number][b].reshape(start.shape)
                torch.testing.assert_close(fast, rows[b][1][index][number], rtol=1e-10, atol=1e-12)
    leaves = [x, *memory.parameters()]
    seeds = torch.randn_like(y)
    given = torch.autograd.grad((y * seeds).sum(), leaves, materialize_grads=True)
    expected = torch.autograd.grad((wanted * seeds).sum(), leaves, materialize_grads=True)
    for left, right in zip(given, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("periods", "changes"), CASES, ids=str)
def test_gradients_end_in_the_same_order_whatever_ticks(periods, changes):
    # ZeRO reduces them in that order, and every rank has rows of its own lengths.
    memory = _memory(periods, **changes)
    ended = []
    for name, parameter in memory.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: ended.append(name))
    orders = []
    for tokens in (1, 3, 5, 19):
        ended.clear()
        y, _, _ = memory(torch.randn(1, tokens, WIDTH, dtype=torch.float64), None, SequenceInfo())
        y.sum().backward()
        orders.append(tuple(ended))
    assert sorted(orders[0]) == sorted(name for name, _ in memory.named_parameters())
    assert len(set(orders)) == 1, orders


@pytest.mark.parametrize(("periods", "changes"), [*CASES, ((2, 6), {"writes": "stop_gradient"})], ids=str)
def test_any_split_of_a_stream_and_a_saved_state_go_on_as_if_uninterrupted(periods, changes, tmp_path):
    memory = _memory(periods, **{**changes, "largest_growth": 0.5})
    x = torch.randn(2, 17, WIDTH, dtype=torch.float64)
    info = SequenceInfo(returns_state=True)
    whole, end, _ = memory(x, None, info)
    for cuts in ([5], [1, 2, 3], [6, 12], [16]):
        state, parts = None, []
        for start, stop in itertools.pairwise([0, *cuts, 17]):
            y, state, _ = memory(x[:, start:stop], state, info)
            parts.append(y)
            torch.save(state, tmp_path / "state.pt")
            state = torch.load(tmp_path / "state.pt", weights_only=False)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-11)
        for left, right in zip(state.tensors(), end.tensors(), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("tokens", [1, 5, 12, 25])
def test_level_l_ticks_exactly_floor_t_over_c_times(tokens):
    periods = [2, 4, 12]
    memory = _memory(periods)
    _, _, health = memory(torch.randn(3, tokens, WIDTH, dtype=torch.float64), None, SequenceInfo(returns_state=True))
    ticks = _loop(memory, torch.randn(tokens, WIDTH, dtype=torch.float64))[2]
    for index, period in enumerate(periods):
        assert float(health[f"memory/level_{index}_updates"]) == tokens // period == len(ticks[index])
        assert num_ticks(tokens, period) == sum(does_tick(t, period) for t in range(1, tokens + 1)) == tokens // period
        assert [t + 1 for t in ticks[index]] == [
            r.stop for r in map(lambda n: tokens_of_tick(n, period), range(tokens // period))
        ]


@pytest.mark.parametrize("rate", [0.5, 0.0])
def test_health_is_the_same_where_errors_are_scaled_and_where_gradients_are(rate):
    # A call that goes on from a state knows no row's place in its period, so it scales the gradients.
    memory = _memory((3, 6))
    if rate == 0.0:
        levels = [level.model_copy(update={"learning_rate": 0.0}) for level in memory.settings.levels]
        memory.settings = memory.settings.model_copy(update={"levels": tuple(levels)})
    x = torch.randn(2, 13, WIDTH, dtype=torch.float64)
    info = SequenceInfo(returns_state=True)
    nothing = memory(x[:, :1], None, info)[1].mapped(torch.zeros_like)
    whole, again = (memory(x, state, info) for state in (None, nothing))
    assert whole[2].keys() == again[2].keys()
    for name, value in whole[2].items():
        torch.testing.assert_close(value, again[2][name], rtol=1e-6, atol=0)
    assert float(whole[2]["memory/level_0_gradient_norm"]) > 0
    torch.testing.assert_close(whole[0], again[0], rtol=1e-10, atol=1e-12)


def test_a_tick_is_the_autograd_gradient_of_the_summed_inner_loss_of_exactly_its_period():
    memory = _memory((4,))
    x = torch.randn(1, 8, WIDTH, dtype=torch.float64)
    _, state, _ = memory(x[:, :4], None, SequenceInfo(returns_state=True))
    _, after, _ = memory(x[:, 4:], state, SequenceInfo(returns_state=True))
    start = [p.detach() for p in memory.start(0)]
    fast = [
        (s + c[0].reshape(s.shape)).detach().requires_grad_()
        for s, c in zip(start, state.levels[0].change, strict=True)
    ]
    inner, inner_bias, outer, outer_bias = fast
    y = F.gelu(x[0, 3:7] @ inner.mT + inner_bias) @ outer.mT + outer_bias
    loss = 0.5 * ((y - memory.value(x[0, 4:8]).detach()) ** 2).sum()
    rate = float(F.softplus(memory.rates[0]).detach()) / WIDTH
    for now, before, gradient in zip(
        after.levels[0].change, state.levels[0].change, torch.autograd.grad(loss, fast), strict=True
    ):
        torch.testing.assert_close(
            now[0].reshape(gradient.shape), before[0].reshape(gradient.shape) - rate * gradient, rtol=1e-9, atol=1e-11
        )


def test_nested_levels_begin_anew_on_the_exact_tick_of_the_slower_level():
    memory = _memory((2, 6), variant="nested", nested_rate=0.0)
    x = torch.randn(1, 12, WIDTH, dtype=torch.float64)
    state, is_reset = None, []
    for t in range(12):
        _, state, _ = memory(x[:, t : t + 1], state, SequenceInfo(returns_state=True))
        is_reset.append(not any(c.any() for c in state.levels[0].change))
    assert is_reset == [True, False, False, False, False, True, True, False, False, False, False, True]


def test_causality_at_every_tick():
    memory = _memory((2, 4))
    x = torch.randn(1, 11, WIDTH, dtype=torch.float64)
    before = memory(x, None, SequenceInfo())[0]
    for position in range(11):
        x[0, position] += 1.0
        after = memory(x, None, SequenceInfo())[0]
        assert torch.equal(before[:, :position], after[:, :position])
        before = after


def test_stopped_writes_give_the_same_values_and_no_gradient_through_the_writes():
    torch.manual_seed(0)
    memory = _memory((2,), writes="stop_gradient")
    x = torch.randn(1, 9, WIDTH, dtype=torch.float64, requires_grad=True)
    y, _, _ = memory(x, None, SequenceInfo())
    torch.testing.assert_close(y[0], _loop(memory, x[0])[0], rtol=1e-10, atol=1e-12)
    gradient = torch.autograd.grad(y[0, 8].sum(), x)[0]
    assert not gradient[0, :8].any() and gradient[0, 8].any()
    assert {n for n, _ in memory.named_parameters()} == {"inner_0", "inner_bias_0", "outer_0", "outer_bias_0"}


def test_one_level_that_never_ticks_is_exactly_a_transformer_mlp():
    torch.manual_seed(1)
    mlp = FeedForward(WIDTH, 4, "gelu").double()
    memory = _memory((0,))
    start_from_mlp(memory, mlp)
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(memory(x, None, SequenceInfo())[0], mlp(x), rtol=1e-12, atol=1e-14)


def test_stopped_writes_carry_no_gradient_also_where_the_change_is_bounded():
    memory = _memory((2, 4), writes="stop_gradient", largest_growth=0.01)
    x = torch.randn(1, 9, WIDTH, dtype=torch.float64, requires_grad=True)
    _, state, _ = memory(x, None, SequenceInfo(returns_state=True))
    for level in state.levels:
        assert any(change.any() for change in level.change)
        assert not any(
            change.requires_grad or pending.requires_grad
            for change, pending in zip(level.change, level.pending, strict=True)
        )


@pytest.mark.parametrize("writes", ["differentiable", "stop_gradient"])
@pytest.mark.parametrize("cadence", ["tokens", "optimizer"])
def test_levels_stacked_on_a_pretrained_model_with_rate_zero_are_that_model_exactly(cadence, writes):
    plain = tiny_model(uses_cms=False, num_layers=2)
    rate = {"rate_scale" if cadence == "optimizer" else "learning_rate": 0.0}
    levels = [{"period": 2, "hidden_units": 24, **rate}, {"period": 4, "hidden_units": 6, **rate}]
    cms = {"form": "chain", "cadence": cadence, "levels": levels, "writes": writes}
    stacked = tiny_model(seed=1, uses_mlp=False, num_layers=2, cms=cms)
    weights = {n: p for n, p in plain.state_dict().items() if ".mlp" not in n}
    weights |= {n.replace("mlp_norm", "cms_norm"): p for n, p in plain.state_dict().items() if "mlp_norm" in n}
    missing, unexpected = stacked.load_state_dict(weights, strict=False)
    assert not unexpected and all(".cms." in name for name in missing)
    for block, source in zip(stacked.layers, plain.layers, strict=True):
        start_from_mlp(block.cms, source.mlp)
    inputs = batch([5, 2], [6, 6])
    found, expected = stacked(inputs).logits, plain(inputs).logits
    if cadence == "optimizer":
        assert torch.equal(found, expected)
    else:  # the same numbers, added up by batched products in chunks
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
        state = stacked(inputs, stacked.initial_state(2)).state
        for block in state.blocks:
            assert not any(change.any() for level in block.cms.levels for change in level.change)


def test_wrong_stacking_and_wrong_periods_are_refused():
    with pytest.raises(ModelError, match="independent"):
        start_from_mlp(_memory((2,), variant="independent"), FeedForward(WIDTH, 4, "gelu"))
    with pytest.raises(ModelError, match="hidden"):
        start_from_mlp(_memory((2,)), FeedForward(WIDTH, 9, "gelu"))
    for periods in ([], [4, 2], [2, 3], [0, 2]):
        with pytest.raises(ModelError):
            check_periods(periods)
        if periods:
            with pytest.raises(ValueError, match="periods"):
                CmsConfig(form="chain", levels=[{"period": p} for p in periods])
    check_periods([2, 4, 0])
    assert base_period([2, 4, 0]) == 2 and base_period([0]) == 0


def test_the_alarm_names_levels_that_never_learn_and_no_others():
    model = tiny_model(
        cms={"form": "chain", "levels": [{"period": 2, "hidden_units": 4}, {"period": 64, "hidden_units": 4}]}
    )
    inputs = batch([0], [20])
    history = [{n: float(v) for n, v in model(inputs).aux.items()} for _ in range(3)]
    assert dead_levels(history) == ["level_1/block_0", "level_1/block_1"]
    long = ModelInput(
        inputs.context_ids, inputs.context_mask, inputs.target_ids.repeat(1, 4), inputs.loss_mask.repeat(1, 4)
    )
    state = model(long, model.initial_state(1))
    assert dead_levels([{n: float(v) for n, v in state.aux.items()}]) == []
    assert dead_levels([{"train/loss_nats": 1.0}]) == []


def test_ticks_over_padding_are_no_sign_of_life():
    model = tiny_model(cms=chain((2, 8)))
    for segments in (None, torch.tensor([[1] * 6 + [0] * 14, [1] * 3 + [2] * 4 + [0] * 13])):
        inputs = batch([0, 0], [6, 7])
        target, mask = (torch.nn.functional.pad(t, (0, 13)) for t in (inputs.target_ids, inputs.loss_mask))
        mask[0, 6:] = False
        target[0, 6:] = 0
        padded = ModelInput(inputs.context_ids, inputs.context_mask, target, mask, segments)
        aux = {name: float(value) for name, value in model(padded).aux.items()}
        assert dead_levels([aux]) == ["level_1/block_0", "level_1/block_1"]
        assert 0 < aux["memory/level_0_updates/block_0"] <= 3


def test_the_alarm_sees_levels_that_the_optimizer_updates():
    model = tiny_model(num_layers=1, cms=chain((1, 4), cadence="optimizer")).train()
    first, second = (list(level.parameters()) for level in model.layers[0].cms.levels)
    inputs, history = batch([3], [5]), []
    for _ in range(4):
        model.zero_grad()
        out = model(inputs, target_loss=cross_entropy)
        history.append({name: float(value) for name, value in out.aux.items()})
        out.nll.sum().backward()
        with torch.no_grad():
            for parameter in first:
                parameter.sub_(0.1 * parameter.grad)
            for parameter in second:  # weight decay alone
                if parameter.dim() > 1:
                    parameter.mul_(0.9)
    assert history[-1]["memory/level_0_updates/block_0"] == 3.0
    assert dead_levels(history) == ["level_1/block_0"]
    with torch.no_grad():
        for parameter in second:
            parameter.sub_(0.1 * parameter.grad)
    history.append({name: float(value) for name, value in model(inputs).aux.items()})
    assert dead_levels(history) == []


def test_change_stays_bounded_over_a_long_constant_stream():
    memory = _memory((8, 64), largest_growth=1.0, writes="stop_gradient")
    state = None
    with torch.no_grad():
        for _ in range(8):
            x = torch.ones(1, 512, WIDTH, dtype=torch.float64) * 3.0
            y, state, health = memory(x, state, SequenceInfo(returns_state=True))
            assert torch.isfinite(y).all()
    for index in range(2):
        start = torch.stack([p.square().sum() for p in memory.start(index)]).sum().sqrt()
        assert float(health[f"memory/level_{index}_change_norm"]) <= float(start.detach()) * (1 + 1e-6)
