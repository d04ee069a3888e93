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


def classifier(seed: int = 0, num_features: int = NUM_FEATURES, num_classes: int = NUM_CLASSES) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(num_features, num_classes).double()


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


def expected_error(model: nn.Linear, x: Tensor, per_group: int) -> float:
    """Root mean square relative error of the estimate of the weight Fisher, in closed form, over the drawn labels.

    A label's score for weight (c, i) is (1[y = c] - p_c) x_i. A sum S of independent ones has variance of S^2 equal to
    sum of fourth cumulants + 2 (sum of variances)^2; groups are independent. `per_group` 1 is `sampled`.
    """
    p = torch.softmax(model(x).detach(), 1)
    second = p * (1 - p)
    cumulant = second * ((1 - p) ** 3 + p**3) - 3 * second**2
    second = (second[:, :, None] * x[:, None] ** 2).unflatten(0, (-1, per_group)).sum(1)
    cumulant = (cumulant[:, :, None] * x[:, None] ** 4).unflatten(0, (-1, per_group)).sum(1)
    variance = (cumulant + 2 * second**2).sum(0) / x.shape[0] ** 2
    return math.sqrt(float(variance.sum() / exact_fisher(model, x).square().sum()))


@pytest.mark.parametrize(
    ("estimator", "sizes", "num_trials"), [("sampled", [32, 256, 2048], 24), ("sampled_sum", [4, 16, 64], 6)]
)
def test_estimates_converge_to_the_closed_form_with_slope_minus_one_half(
    estimator: str, sizes: list[int], num_trials: int
) -> None:
    """Error against examples (groups of four for `sampled_sum`): slope -1/2, and its size is the one that theory gives."""
    model = classifier(0, 24, 10)
    per_group = 4 if estimator == "sampled_sum" else 1
    eight = torch.randn(8, 24, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    errors, ratios = [], []
    for size in sizes:
        # The same few feature rows again and again: the only randomness left is that of the labels.
        x = eight[torch.arange(per_group * size) % 8]
        exact, squared = exact_fisher(model, x), 0.0
        for trial in range(num_trials):
            config = FisherConfig(
                estimator=estimator,
                num_groups=size,
                seed=trial,
                micro_batch_examples=4 if per_group == 4 else 2048,
                checks_fast_path=False,
            )
            found = estimate(model, x, torch.zeros(len(x), dtype=torch.long), config)["weight"]
            squared += float((found - exact).square().sum() / exact.square().sum()) / num_trials
        errors.append(math.sqrt(squared))
        ratios.append(errors[-1] / expected_error(model, x, per_group))
    # Over other seeds the ratios stay within 0.1 and the slopes within 0.04.
    assert slope(sizes, errors) == pytest.approx(-0.5, abs=0.05), errors
    assert ratios == pytest.approx([1.0] * len(sizes), abs=0.2)


def test_sum_estimators_have_about_the_stated_relative_error() -> None:
    """Relative error sqrt(2 / groups) for many examples a group, from the central limit."""
    model = classifier()
    num_groups, per_group = 64, 64
    x = torch.randn(8, NUM_FEATURES, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x = x[torch.arange(num_groups * per_group) % 8]
    exact = exact_fisher(model, x)
    ratios = []
    for seed in range(12):
        config = FisherConfig(
            estimator="sampled_sum", num_groups=num_groups, seed=seed, micro_batch_examples=64, checks_fast_path=False
        )
        found = estimate(model, x, torch.zeros(x.shape[0], dtype=torch.long), config)["weight"]
        ratios.append((found / exact - 1).square())
    error = float(torch.stack(ratios).mean().sqrt())
    assert error == pytest.approx(math.sqrt(2 / num_groups), rel=0.2)


def test_sampled_and_signed_estimates_are_unbiased() -> None:
    """Many draws of the same 16 examples: examples of `sampled`, groups (over seeds) of the `_sum` estimators."""
    model = classifier(3)
    x = torch.randn(16, NUM_FEATURES, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    y = torch.arange(16) % NUM_CLASSES
    empirical = estimate(model, x, y, FisherConfig(estimator="empirical", micro_batch_examples=16))["weight"]
    copies = 4000
    config = FisherConfig(estimator="sampled", micro_batch_examples=16 * copies, checks_fast_path=False)
    found = estimate(model, x.repeat(copies, 1), y.repeat(copies), config)["weight"]
    goal = exact_fisher(model, x)
    assert float((found - goal).norm() / goal.norm()) < 0.01  # expected: 0.005
    num_seeds = 100
    for estimator, goal in {"sampled_sum": exact_fisher(model, x), "signed_sum": empirical}.items():
        mean = torch.zeros_like(goal)
        for seed in range(num_seeds):
            config = FisherConfig(
                estimator=estimator, num_groups=4, seed=seed, micro_batch_examples=4, checks_fast_path=False
            )
            mean += estimate(model, x, y, config)["weight"] / num_seeds
        # 400 groups: sqrt(2 / 400) = 0.07 for each entry.
        assert float((mean - goal).norm() / goal.norm()) < 0.08, estimator


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
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-15)
    copies = 4000
    config = FisherConfig(estimator="sampled", micro_batch_examples=12 * copies, checks_fast_path=False)
    drawn = estimate(model, x.repeat(copies, 1), y.repeat(copies), config)
    for value, expected in zip(drawn.values(), exact, strict=True):
        assert float((value - expected).norm() / expected.norm()) < 0.02
