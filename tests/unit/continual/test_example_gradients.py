"""Batched per-example gradients: every rule against torch.func, shared parameters, announced rows, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from hsmn_dist.continual.example_gradients import ExampleGradients, Uncovered, UnknownRowsError
from hsmn_dist.continual.square_sums import add_squares, add_sum
from hsmn_dist.models.example_rows import current_rows, example_rows, per_example, tied_linear

NUM_EXAMPLES = 5


def tapped_squares(model: nn.Module, loss_of, num_examples: int = NUM_EXAMPLES) -> dict[str, Tensor]:
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    totals: dict[str, Tensor] = {}

    def finished(name, uses) -> None:
        assert name not in totals, "finished once"
        totals[name] = torch.zeros_like(wanted[name])
        add_squares(uses, num_examples, totals[name])

    taps = ExampleGradients(model, wanted)
    with taps.installed():
        taps.run(loss_of, num_examples, finished)
    return totals


def looped_squares(model: nn.Module, loss_of_row, num_examples: int = NUM_EXAMPLES) -> dict[str, Tensor]:
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    totals = {name: torch.zeros_like(p) for name, p in wanted.items()}
    for row in range(num_examples):
        found = torch.autograd.grad(loss_of_row(row), list(wanted.values()), allow_unused=True)
        for name, gradient in zip(wanted, found, strict=True):
            if gradient is not None:
                totals[name] += gradient.square()
    return totals


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, expected in wanted.items():
        got = found.get(name, torch.zeros_like(expected))
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


class Everything(nn.Module):
    """One module of each kind with a rule, at odd sizes; a Linear used twice; an Embedding with padding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(13, 6, padding_idx=2)
        self.norm = nn.LayerNorm(6)
        self.shared = nn.Linear(6, 6)
        self.rms = nn.RMSNorm(6)
        self.two_axes = nn.LayerNorm((3, 6))
        self.plain = nn.RMSNorm(6, elementwise_affine=False)
        self.out = nn.Linear(6, 3, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.table(ids))
        x = x + torch.tanh(self.shared(x))
        x = self.two_axes(self.rms(x + self.shared(x[:, :1])))
        return self.out(self.plain(x)).square().mean((1, 2))


def seeded(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return model.double()


IDS = torch.randint(0, 13, (NUM_EXAMPLES, 3), generator=torch.Generator().manual_seed(2))


def test_every_rule_equals_torch_func_per_sample_gradients() -> None:
    model = seeded(Everything())
    found = tapped_squares(model, lambda: model(IDS).sum())
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights, ids):
        return functional_call(model, weights, (ids[None],)).sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, IDS)
    assert_same(found, {name: g.square().sum(0) for name, g in per_sample.items()})


def test_sums_over_all_examples_equal_the_ordinary_gradient() -> None:
    model = seeded(Everything())
    wanted = dict(model.named_parameters())
    totals = {name: torch.zeros_like(p) for name, p in wanted.items()}
    taps = ExampleGradients(model, wanted)
    with taps.installed():
        taps.run(lambda: model(IDS).sum(), NUM_EXAMPLES, lambda name, uses: add_sum(uses, totals[name]))
    expected = torch.autograd.grad(model(IDS).sum(), list(wanted.values()))
    assert_same(totals, dict(zip(wanted, expected, strict=True)))


def test_nothing_reaches_the_parameters() -> None:
    model = seeded(Everything())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
        parameter.register_hook(lambda _: pytest.fail("a parameter got a gradient"))
    tapped_squares(model, lambda: model(IDS).sum())
    assert all((p.grad == 7.0).all() for p in model.parameters())
    assert not model._forward_hooks and not model.shared._forward_hooks


def test_a_frozen_parameter_is_left_out() -> None:
    model = seeded(Everything())
    model.shared.weight.requires_grad_(False)
    model.table.weight.requires_grad_(False)
    found = tapped_squares(model, lambda: model(IDS).sum())
    assert_same(found, looped_squares(model, lambda row: model(IDS[row : row + 1]).sum()))
    assert "shared.weight" not in found and "table.weight" not in found and "shared.bias" in found


class Tied(nn.Module):
    """A table that is also the head, through another module, through `tied_linear`, or both."""

    def __init__(self, through: str) -> None:
        super().__init__()
        self.table = nn.Embedding(13, 6)
        self.mid = nn.Linear(6, 6)
        self.through = through
        if through != "function":
            self.head = nn.Linear(6, 13, bias=False)
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.mid(self.table(ids))
        logits = tied_linear(x, self.table.weight) if self.through == "function" else self.head(x)
        if self.through == "both":
            logits = logits + tied_linear(torch.tanh(x), self.table.weight)
        return torch.logsumexp(logits, -1).sum(1)


@pytest.mark.parametrize("through", ["module", "function", "both"])
def test_a_tied_table_adds_its_uses_before_squaring(through: str) -> None:
    model = seeded(Tied(through))
    ids = IDS[:, [0, 1, 2, 0]]
    found = tapped_squares(model, lambda: model(ids).sum())
    assert_same(found, looped_squares(model, lambda row: model(ids[row : row + 1]).sum()))


class UsedInEveryWay(nn.Module):
    """One table that is looked up, is the head, and is a plain tensor of every example too; `ways` says which."""

    def __init__(self, ways: str) -> None:
        super().__init__()
        self.table = nn.Embedding(13, 6)
        self.ways = ways

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.table(ids)) if "lookup" in self.ways else ids[..., None].double() * torch.ones(6).double()
        logits = tied_linear(x, self.table.weight) if "head" in self.ways else x
        whole = per_example(self.table.weight, len(ids))
        return torch.logsumexp(logits, -1).sum(1) + (whole * x.sum(1)[:, None]).square().sum((1, 2))


@pytest.mark.parametrize("ways", ["lookup and head", "lookup", "head"])
def test_a_parameter_used_as_a_whole_besides_adds_all_its_uses_before_squaring(ways: str) -> None:
    model = seeded(UsedInEveryWay(ways))
    found = tapped_squares(model, lambda: model(IDS).sum())
    assert_same(found, looped_squares(model, lambda row: model(IDS[row : row + 1]).sum()))


class Flat(nn.Module):
    """Parts of all examples in one flat batch, unevenly and out of order; and a Parameter of its own."""

    def __init__(self, announces: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)
        self.table = nn.Embedding(7, 5)
        self.gain = nn.Parameter(torch.ones(2, 5))
        self.announces = announces

    def forward(self, x: Tensor, owners: Tensor, num_examples: int) -> Tensor:
        with example_rows(owners if self.announces else None):
            rows = self.norm(torch.tanh(self.first(x)))
            rows = rows + self.table(torch.arange(x.shape[1]).expand(x.shape[0], -1))
        sums = torch.zeros(num_examples, 5, dtype=x.dtype).index_add(0, owners, rows.sum(1))
        return (torch.tanh(sums)[:, None] * per_example(self.gain, num_examples)).square().sum((1, 2))


OWNERS = torch.tensor([3, 0, 0, 4, 3, 3, 1])
PARTS = torch.randn(7, 2, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def flat_row(model: Flat, row: int) -> Tensor:
    pick = row == OWNERS
    return model(PARTS[pick], torch.zeros(int(pick.sum()), dtype=torch.long), 1).sum()


def test_announced_rows_and_expanded_parameters_go_to_their_examples() -> None:
    model = seeded(Flat())
    found = tapped_squares(model, lambda: model(PARTS, OWNERS, NUM_EXAMPLES).sum())
    assert_same(found, looped_squares(model, lambda row: flat_row(model, row)))
    assert current_rows() is None


def test_rows_of_unknown_examples_are_refused() -> None:
    model = seeded(Flat(announces=False))
    with pytest.raises(UnknownRowsError, match="Linear"):
        tapped_squares(model, lambda: model(PARTS, OWNERS, NUM_EXAMPLES).sum())


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) * self.scale).square().sum((1, 2))


def test_a_parameter_without_a_rule_is_named() -> None:
    model = seeded(Raw())
    with pytest.raises(Uncovered, match="scale"):
        tapped_squares(model, lambda: model(torch.randn(NUM_EXAMPLES, 2, 3, dtype=torch.float64)).sum())


@pytest.mark.parametrize("kind", ["sparse", "max_norm", "subclass"])
def test_modules_that_only_look_like_known_ones_have_no_rule(kind: str) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2 + self.weight.sum()

    if kind == "subclass":
        model: nn.Module = Doubled(3, 3)
    else:
        model = nn.Embedding(5, 3, **({"sparse": True} if kind == "sparse" else {"max_norm": 1.0}))
    assert ExampleGradients(model, dict(model.named_parameters())).uncovered()


def test_a_use_that_does_not_reach_the_loss_adds_nothing() -> None:
    model = seeded(Everything())
    x = torch.randn(NUM_EXAMPLES, 3, 6, dtype=torch.float64)

    def loss() -> Tensor:
        model.shared(x).sum()
        return model.shared(x).square().sum()

    found = tapped_squares(model, loss)
    assert_same(found, looped_squares(model, lambda row: model.shared(x[row : row + 1]).square().sum()))


def test_checkpointed_parts_are_counted_once_and_their_inputs_dropped() -> None:
    model = seeded(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)))
    x = torch.randn(NUM_EXAMPLES, 3, 6, dtype=torch.float64)
    kept: list[tuple[int, ...]] = []

    def loss(rows: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
            return checkpoint(model, rows, use_reentrant=False).square().sum()

    found = tapped_squares(model, lambda: loss(x))
    num_kept = len(kept)
    assert_same(found, looped_squares(model, lambda row: model(x[row : row + 1]).square().sum()))
    kept.clear()
    loss(x)
    assert num_kept == len(kept), "the taps keep nothing that checkpointing would have dropped"


def test_large_weights_are_squared_block_by_block() -> None:
    model = seeded(nn.Linear(300, 700))
    x = torch.randn(NUM_EXAMPLES, 4, 300, dtype=torch.float64)
    found = tapped_squares(model, lambda: torch.tanh(model(x)).sum())
    assert_same(found, looped_squares(model, lambda row: torch.tanh(model(x[row : row + 1])).sum()))


def test_one_row_an_example_needs_no_product_per_example() -> None:
    model = seeded(nn.Linear(6, 4))
    x = torch.randn(NUM_EXAMPLES, 6, dtype=torch.float64)
    found = tapped_squares(model, lambda: torch.tanh(model(x)).sum())
    assert_same(found, looped_squares(model, lambda row: torch.tanh(model(x[row : row + 1])).sum()))
