"""Transfer metrics: hand-computed matrices, the None status, and bootstrap intervals."""

from __future__ import annotations

import random

import pytest

from hsmn_dist.continual.transfer import bootstrap_mean, bootstrap_transfer, quantile, transfer_metrics
from hsmn_dist.foundation.errors import DataError

MATRIX = [[0.8, 0.2, 0.1], [0.6, 0.9, 0.3], [0.5, 0.7, 0.6]]
BASELINE = [0.1, 0.1, 0.2]


def test_metrics_equal_the_formulas_worked_by_hand() -> None:
    metrics = transfer_metrics(MATRIX, BASELINE)
    assert metrics.average_accuracy == pytest.approx((0.5 + 0.7 + 0.6) / 3)
    assert metrics.backward_transfer == pytest.approx(((0.5 - 0.8) + (0.7 - 0.9)) / 2)
    assert metrics.forward_transfer == pytest.approx(((0.2 - 0.1) + (0.3 - 0.2)) / 2)
    assert metrics.forgetting == pytest.approx(((0.8 - 0.5) + (0.9 - 0.7)) / 2)
    assert metrics.learning_accuracy == pytest.approx((0.8 + 0.9 + 0.6) / 3)
    assert metrics.forgetting_by_task == [pytest.approx(0.3), pytest.approx(0.2), None]


def test_forgetting_looks_at_the_best_earlier_row_and_not_the_diagonal() -> None:
    metrics = transfer_metrics([[0.5, 0.0], [0.4, 0.8]])
    assert metrics.forgetting == pytest.approx(0.1)
    better_later = transfer_metrics([[0.5, 0.0, 0.0], [0.7, 0.8, 0.0], [0.6, 0.8, 0.9]])
    assert better_later.forgetting_by_task[0] == pytest.approx(0.1)
    assert better_later.backward_transfer == pytest.approx(0.05)


def test_a_running_curriculum_counts_the_tasks_learned_so_far() -> None:
    metrics = transfer_metrics(MATRIX[:2], BASELINE)
    assert metrics.num_tasks == 2
    assert metrics.average_accuracy == pytest.approx((0.6 + 0.9) / 2)
    assert metrics.forward_transfer == pytest.approx(0.1)


def test_one_stage_has_no_transfer() -> None:
    metrics = transfer_metrics([[0.3, 0.1]])
    assert (metrics.backward_transfer, metrics.forgetting, metrics.forward_transfer) == (None, None, None)


def test_not_measured_is_never_counted_as_zero() -> None:
    metrics = transfer_metrics([[0.8, None, 0.1], [0.6, None, 0.3], [0.5, None, 0.6]])
    assert metrics.average_accuracy == pytest.approx(0.55)
    assert metrics.forgetting_by_task == [pytest.approx(0.3), None, None]
    assert metrics.forgetting == pytest.approx(0.3)


@pytest.mark.parametrize("matrix", [[], [[0.1], [0.2]], [[0.1, 0.2], [0.3]]])
def test_a_matrix_of_the_wrong_shape_is_refused(matrix) -> None:
    with pytest.raises(DataError, match="accuracy matrix"):
        transfer_metrics(matrix)


def example_scores(seed: int, num: int = 40):
    generator = random.Random(seed)
    return [[[float(generator.random() < p) for _ in range(num)] for p in row] for row in MATRIX]


def test_bootstrap_is_seeded_and_its_interval_holds_the_point() -> None:
    scores = example_scores(0)
    first, again = (bootstrap_transfer(scores, num_resamples=200, seed=3) for _ in range(2))
    assert first == again
    for name, (low, high) in first.intervals.items():
        assert low <= getattr(first, name) <= high and high > low
    assert "forward_transfer" not in first.intervals


def test_bootstrap_draws_the_same_examples_for_every_stage() -> None:
    # Scores that never change between stages cannot be forgotten in any resample.
    column = [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    metrics = bootstrap_transfer([[column, column], [column, column]], num_resamples=100)
    assert metrics.intervals["forgetting"] == (0.0, 0.0)
    low, high = metrics.intervals["average_accuracy"]
    assert low < 0.5 < high


def test_weights_count_an_example_by_its_tokens_in_every_draw() -> None:
    # One long example of loss 1 and three short ones of loss 0: by tokens the mean is 0.75, by examples 0.25.
    column = [-1.0, 0.0, 0.0, 0.0]
    metrics = bootstrap_transfer([[column]], weights=[[9.0, 1.0, 1.0, 1.0]], num_resamples=300)
    assert metrics.average_accuracy == pytest.approx(-0.75)
    low, high = metrics.intervals["average_accuracy"]
    assert low < -0.75 < high <= 0.0


def test_bootstrap_interval_of_a_mean_has_about_the_normal_width() -> None:
    generator = random.Random(1)
    scores = [float(generator.random() < 0.5) for _ in range(400)]
    low, high = bootstrap_mean(scores, num_resamples=1000)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.15)


def test_stages_scored_on_different_examples_are_refused() -> None:
    with pytest.raises(DataError, match=r"\[2, 3\]"):
        bootstrap_transfer([[[1.0, 0.0], [1.0]], [[1.0, 0.0, 1.0], [1.0]]])


def test_quantile_interpolates() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.25) == 1.5
