"""Labels drawn from the model, signs, reversed logits: seeded by example and position, and distributed as they should be."""

from __future__ import annotations

import pytest
import torch

from hsmn_dist.continual.labels import (
    ExampleNumbers,
    reversed_cross_entropy,
    sample_labels,
    signs,
    target_loss,
    uniform,
)
from hsmn_dist.models.contract import cross_entropy


def test_drawn_labels_follow_the_models_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, -9.0])
    num = 40_000
    points = uniform(3, torch.arange(num), torch.zeros(num, dtype=torch.long))
    counts = torch.bincount(sample_labels(logits.expand(num, -1), points), minlength=5)
    expected = torch.softmax(logits, 0) * num
    assert ((counts - expected).abs() <= 5 * expected.sqrt() + 1).all()


def test_uniforms_are_spread_evenly_over_examples_and_positions() -> None:
    for examples, positions in (
        (torch.arange(20_000), torch.zeros(20_000, dtype=torch.long)),
        (torch.zeros(20_000, dtype=torch.long), torch.arange(20_000)),
    ):
        points = uniform(0, examples, positions)
        assert float(points.min()) >= 0 and float(points.max()) < 1
        counts = torch.histc(points.float(), 20, 0, 1)
        assert float(((counts - 1000) ** 2 / 1000).sum()) < 45  # chi squared with 19 degrees of freedom, p about 0.001
        assert abs(float(torch.corrcoef(torch.stack([points[:-1], points[1:]]))[0, 1])) < 0.03


def test_what_is_drawn_depends_on_seed_example_and_position_alone() -> None:
    logits = torch.randn(6, 11, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(6, dtype=torch.long)
    index = torch.tensor([7, 900, 31])
    rows, positions = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 3, 0, 2, 1, 5])
    whole = target_loss("sampled", 4, index)(logits, labels, rows, positions)
    for row in range(3):
        pick = rows == row
        alone = target_loss("sampled", 4, index[row : row + 1])
        found = alone(logits[pick], labels[pick], torch.zeros(2, dtype=torch.long), positions[pick])
        assert torch.equal(found, whole[pick])
    assert not torch.equal(target_loss("sampled", 5, index)(logits, labels, rows, positions), whole)
    assert torch.equal(target_loss("sampled", 4, index)(logits, labels + 3, rows, positions), whole), (
        "true labels play no part"
    )


def test_a_certain_model_draws_its_certain_label() -> None:
    logits = torch.full((50, 9), -200.0)
    logits[:, 4] = 0.0
    assert (sample_labels(logits, torch.linspace(1e-9, 1 - 1e-9, 50, dtype=torch.float64)) == 4).all()


def test_a_label_of_probability_zero_is_never_drawn() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]])
    for point in (0.0, 0.49999, 0.5, 0.99999999):
        assert int(sample_labels(logits, torch.tensor([point], dtype=torch.float64))) in (1, 3)


def test_signs_are_plus_or_minus_one_and_balanced() -> None:
    drawn = signs(9, torch.arange(10_000))
    assert set(drawn.tolist()) == {-1.0, 1.0}
    assert abs(float(drawn.mean())) < 0.04
    assert torch.equal(signs(9, torch.tensor([5, 17])), drawn[[5, 17]])


@pytest.mark.parametrize("estimator", ["empirical", "signed_sum", "microbatch"])
def test_data_estimators_use_the_plain_loss(estimator) -> None:
    rows, labels = torch.arange(3), torch.tensor([1, 0, 3])
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    loss = target_loss(estimator, 0, torch.zeros(3))
    assert torch.equal(loss(logits, labels, rows, rows), cross_entropy(logits, labels, rows, rows))
    exact = loss(logits.double(), labels, rows, rows)
    assert exact.dtype == torch.float64, "float64 models keep their precision here"
    torch.testing.assert_close(exact.float(), loss(logits, labels, rows, rows))


def test_reversed_logits_keep_a_gradient_where_the_model_is_certain() -> None:
    rows = torch.zeros(1, dtype=torch.long)
    logits = torch.tensor([[20.0, 0.0, 0.0]], requires_grad=True)
    plain = torch.autograd.grad(cross_entropy(logits, rows, rows, rows).sum(), logits)[0]
    reversed_ = torch.autograd.grad(reversed_cross_entropy(logits, rows, rows, rows).sum(), logits)[0]
    assert float(plain.norm()) < 1e-7 < 0.5 < float(reversed_.norm())
    by_hand = -torch.log_softmax(-logits.detach(), 1)[0, 0]
    assert reversed_cross_entropy(logits, rows, rows, rows).item() == pytest.approx(float(by_hand))


def test_examples_of_later_datasets_get_numbers_of_their_own() -> None:
    numbers = ExampleNumbers()
    first = numbers.of_step([0, 1, 2, -1])
    second = numbers.of_step([2, 5, 0, -1])
    third = numbers.of_step([0])
    assert first == [0, 1, 2, -1] and second[1] == 5 and second[3] == -1
    given = [number for number in first + second + third if number >= 0]
    assert len(set(given)) == len(given)
    drawn = signs(3, torch.tensor(given))
    assert torch.equal(drawn, signs(3, torch.tensor(given))) and set(drawn.tolist()) <= {-1.0, 1.0}
