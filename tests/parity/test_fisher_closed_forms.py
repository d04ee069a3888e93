"""Fisher estimates against closed forms: logistic regression, the enumeration of labels, and published formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hsmn_dist.config.continual import FisherConfig
from hsmn_dist.continual.fisher import FisherPass
from hsmn_dist.continual.labels import signs, target_loss
from tests.support.param_shards import module_shards

NUM_CLASSES, NUM_FEATURES = 3, 4


def classifier(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(NUM_FEATURES, NUM_CLASSES).double()


def estimate(model: nn.Module, x: Tensor, y: Tensor, config: FisherConfig) -> dict[str, Tensor]:
    """The Fisher of a classifier by `FisherPass`; an example is one feature row."""
    zeros = torch.zeros(x.shape[0], dtype=torch.long)

    def loss(batch, weights: Tensor) -> Tensor:
        rows = torch.arange(batch["x"].shape[0])
        positions = zeros[: len(rows)]
        losses = target_loss(config.estimator, config.seed, batch["index"])(
            model(batch["x"]), batch["y"], rows, positions
        )
        if config.estimator == "signed_sum":
            losses = losses * signs(config.seed, batch["index"])
        return (losses * weights).sum()

    shards = module_shards(model)
    fisher = FisherPass(model, shards, loss, config, x.shape[0])
    size = config.micro_batch_examples
    for start in range(0, x.shape[0], size):
        part = slice(start, start + size)
        fisher.add({"x": x[part], "y": y[part], "index": torch.arange(start, start + size)})
    found = fisher.result()
    fisher.close()
    return {shard.name: value.view(shard.shape) for shard, value in zip(shards, found, strict=True)}


def exact_fisher(model: nn.Linear, x: Tensor) -> Tensor:
    """E_x [p_c (1 - p_c) x_i^2], the closed form of multinomial logistic regression's weight Fisher."""
    p = torch.softmax(model(x).detach(), 1)
    return (p * (1 - p)).t() @ x.square() / x.shape[0]


def slope(sizes: list[int], errors: list[float]) -> float:
    """Least-squares slope of log error against log size."""
    a, b = torch.tensor(sizes).double().log(), torch.tensor(errors).double().log()
    return float(((a - a.mean()) * (b - b.mean())).sum() / (a - a.mean()).square().sum())


@pytest.mark.parametrize("estimator", ["sampled", "sampled_sum"])
def test_estimates_converge_to_the_closed_form_with_slope_minus_one_half(estimator: str) -> None:
    model = classifier()
    is_grouped = estimator == "sampled_sum"
    sizes, errors = ([8, 32, 128] if is_grouped else [32, 256, 2048]), []
    for size in sizes:
        squared = []
        for trial in range(12):
            num_examples = 4 * size if is_grouped else size  # groups of four examples
            # The same few feature rows again and again: the only randomness left is that of the labels.
            x = torch.randn(8, NUM_FEATURES, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
            x = x[torch.arange(num_examples) % 8]
            config = FisherConfig(
                estimator=estimator,
                num_groups=size,
                seed=trial,
                micro_batch_examples=4 if is_grouped else 2048,
                checks_fast_path=False,
            )
            exact = exact_fisher(model, x)
            found = estimate(model, x, torch.zeros(num_examples, dtype=torch.long), config)["weight"]
            squared.append(float((found - exact).square().sum() / exact.square().sum()))
        errors.append(math.sqrt(sum(squared) / len(squared)))
    assert slope(sizes, errors) == pytest.approx(-0.5, abs=0.08), errors
    assert errors[-1] < 0.2


def test_sum_estimators_have_about_the_stated_relative_error() -> None:
    """Relative error sqrt(2 / groups) for many examples a group, from the central limit."""
    model = classifier()
    num_groups, per_group = 64, 32
    x = torch.randn(8, NUM_FEATURES, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x = x[torch.arange(num_groups * per_group) % 8]
    exact = exact_fisher(model, x)
    ratios = []
    for seed in range(12):
        config = FisherConfig(
            estimator="sampled_sum", num_groups=num_groups, seed=seed, micro_batch_examples=32, checks_fast_path=False
        )
        found = estimate(model, x, torch.zeros(x.shape[0], dtype=torch.long), config)["weight"]
        ratios.append((found / exact - 1).square())
    error = float(torch.stack(ratios).mean().sqrt())
    assert error == pytest.approx(math.sqrt(2 / num_groups), rel=0.2)


def test_sampled_and_signed_estimates_are_unbiased_over_seeds() -> None:
    model = classifier(3)
    x = torch.randn(16, NUM_FEATURES, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    y = torch.arange(16) % NUM_CLASSES
    empirical = estimate(model, x, y, FisherConfig(estimator="empirical", micro_batch_examples=16))["weight"]
    goals = {"sampled": exact_fisher(model, x), "sampled_sum": exact_fisher(model, x), "signed_sum": empirical}
    for estimator, goal in goals.items():
        mean = torch.zeros_like(goal)
        for seed in range(120):
            config = FisherConfig(
                estimator=estimator, num_groups=4, seed=seed, micro_batch_examples=4, checks_fast_path=False
            )
            mean += estimate(model, x, y, config)["weight"] / 120
        assert float((mean - goal).norm() / goal.norm()) < 0.12, estimator


def test_the_four_ways_of_arxiv_2502_11756_on_its_kind_of_classifier() -> None:
    """EXACT by enumerating labels, SAMPLE, EMPIRICAL and BATCHED (section 3 there), each computed plainly here."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(NUM_FEATURES, 6), nn.ReLU(), nn.Linear(6, NUM_CLASSES)).double()
    x = torch.randn(12, NUM_FEATURES, dtype=torch.float64)
    y = torch.randint(0, NUM_CLASSES, (12,))
    weights = list(model.parameters())

    def squares(loss: Tensor) -> list[Tensor]:
        return [g.square() for g in torch.autograd.grad(loss, weights)]

    def mean_of(parts: list[list[Tensor]]) -> list[Tensor]:
        return [torch.stack(column).mean(0) for column in zip(*parts, strict=True)]

    empirical = mean_of([squares(functional.cross_entropy(model(x[i]), y[i])) for i in range(12)])
    batched = mean_of([squares(functional.cross_entropy(model(x[i : i + 4]), y[i : i + 4])) for i in range(0, 12, 4)])
    exact = [torch.zeros_like(w) for w in weights]
    for i in range(12):
        probabilities = torch.softmax(model(x[i]).detach(), 0)
        for label in range(NUM_CLASSES):
            for total, part in zip(
                exact, squares(functional.cross_entropy(model(x[i]), torch.tensor(label))), strict=True
            ):
                total += probabilities[label] * part / 12
    for estimator, wanted in (("empirical", empirical), ("microbatch", batched)):
        found = estimate(model, x, y, FisherConfig(estimator=estimator, micro_batch_examples=4))
        for value, expected in zip(found.values(), wanted, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-9)
    drawn = [torch.zeros_like(w) for w in weights]
    for seed in range(300):
        config = FisherConfig(estimator="sampled", seed=seed, micro_batch_examples=12, checks_fast_path=False)
        for total, value in zip(drawn, estimate(model, x, y, config).values(), strict=True):
            total += value / 300
    for value, expected in zip(drawn, exact, strict=True):
        assert float((value - expected).norm() / expected.norm()) < 0.1
