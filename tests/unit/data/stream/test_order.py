"""The order of one dataset and of a mixture: pure functions, complete and even."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsmn_dist.data.stream.mixture import PERIOD, Mixture, period_counts
from hsmn_dist.data.stream.order import SampleOrder, hash_key, permutation
from hsmn_dist.foundation.errors import DataError


def numbers(order: SampleOrder, start: int, stop: int) -> list[int]:
    return order.sample_numbers(np.arange(start, stop)).tolist()


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    window=st.integers(0, 5),
    seed=st.integers(0, 2**40),
    cuts=st.lists(st.integers(0, 200), max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_each_epoch_holds_every_sample_once_and_seeking_changes_nothing(
    sizes: list[int], window: int, seed: int, cuts: list[int]
) -> None:
    total = sum(sizes)
    whole = numbers(SampleOrder(sizes, seed, window), 0, 3 * total)
    for epoch in range(3):
        assert sorted(whole[epoch * total : (epoch + 1) * total]) == list(range(total))
    fresh = SampleOrder(sizes, seed, window)
    for cut in cuts:
        assert numbers(fresh, min(cut, 3 * total), 3 * total) == whole[cut:]


def test_the_order_is_the_same_for_ever() -> None:
    # Written down once: a change of these numbers would break the resume of every run that was started before it.
    assert permutation(10, 42).tolist() == PERMUTATION_10_42
    assert numbers(SampleOrder([4, 3, 5], 7, 2), 0, 12) == ORDER_4_3_5
    assert int(hash_key(1, 2, 3)[0]) == HASH_1_2_3


PERMUTATION_10_42 = [7, 4, 0, 2, 6, 5, 1, 8, 3, 9]
ORDER_4_3_5 = [5, 0, 2, 4, 3, 6, 1, 9, 8, 10, 7, 11]
HASH_1_2_3 = 15020427595393229491


def test_epochs_and_seeds_differ() -> None:
    order = SampleOrder([50, 50], 1)
    first, second = numbers(order, 0, 100), numbers(order, 100, 200)
    assert first != second and first != numbers(SampleOrder([50, 50], 2), 0, 100)


def test_a_window_bounds_the_shards_in_use() -> None:
    sizes = [10] * 20
    order = SampleOrder(sizes, 3, window_shards=4)
    stream = np.array(numbers(order, 0, 200)) // 10
    for window in range(5):
        assert len(set(stream[window * 40 : (window + 1) * 40].tolist())) == 4


def test_a_permutation_is_uniform_enough() -> None:
    # Chi-square of where sample 0 lands over 4000 keys: 9 degrees of freedom, 27.9 is the 0.1 percent point.
    places = np.bincount([int(np.flatnonzero(permutation(10, key) == 0)[0]) for key in range(4000)], minlength=10)
    assert ((places - 400) ** 2 / 400).sum() < 27.9


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, 0.2, 0.1], [5, 3, 1, 1], [0.999, 0.001], [1 / 3] * 3])
def test_any_window_of_ten_thousand_has_the_stated_proportions(weights: list[float]) -> None:
    mixture = Mixture([SampleOrder([97], source) for source in range(len(weights))], weights)
    sources, _ = mixture.locate(np.arange(45_000))
    shares = np.array(weights) / sum(weights)
    for start in range(0, 35_000, 1234):
        counts = np.bincount(sources[start : start + 10_000], minlength=len(weights))
        assert np.abs(counts - shares * 10_000).max() <= 1.0


@pytest.mark.parametrize("size", [16, 100, 777])
def test_short_runs_are_off_by_about_one_sample_per_source(size: int) -> None:
    weights = np.array([0.55, 0.25, 0.15, 0.05])
    sources, _ = Mixture([SampleOrder([9], k) for k in range(4)], weights.tolist()).locate(np.arange(20_000))
    for start in range(0, 19_000, 97):
        counts = np.bincount(sources[start : start + size], minlength=4)
        assert np.abs(counts - weights * size).max() <= 2.5


def test_a_source_of_a_mixture_is_read_in_its_own_order_without_gaps() -> None:
    orders = [SampleOrder([7, 5], 1), SampleOrder([30], 2)]
    sources, found = Mixture(orders, [0.3, 0.7]).locate(np.arange(12_345))
    for source, order in enumerate(orders):
        mine = found[sources == source]
        assert mine.tolist() == numbers(order, 0, len(mine))


def test_example_indexes_are_unique_over_the_mix() -> None:
    mixture = Mixture([SampleOrder([7, 5], 1), SampleOrder([30], 2)], [1, 1])
    sources, found = mixture.locate(np.arange(200))
    index = mixture.example_index(sources, found)
    pairs = set(zip(sources.tolist(), found.tolist(), strict=True))
    assert len(pairs) == len(set(index.tolist())) == 42 and set(index.tolist()) == set(range(42))


def test_period_counts_sum_to_the_period_and_keep_rare_sources() -> None:
    counts = period_counts([1e-9, 1, 1])
    assert counts.sum() == PERIOD and counts[0] == 1 and set(counts[1:].tolist()) == {4999, 5000}


@pytest.mark.parametrize("weights", [[], [0.0, 1.0], [-1.0]])
def test_weights_that_are_not_positive_are_refused(weights: list[float]) -> None:
    with pytest.raises(DataError):
        period_counts(weights)
