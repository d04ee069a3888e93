"""Metrics against enumeration, hand-made cases and the libraries."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hsmn_dist.evaluation import metrics


@pytest.mark.parametrize(("n", "c", "k"), [(1, 1, 1), (5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 4), (7, 3, 5), (8, 1, 8)])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_pass(n, c, k):
    outcomes = [True] * c + [False] * (n - c)
    draws = list(itertools.combinations(outcomes, k))
    assert metrics.pass_at_k(n, c, k) == pytest.approx(sum(any(draw) for draw in draws) / len(draws), abs=1e-12)


def test_pass_at_k_refuses_more_draws_than_samples():
    for n, c, k in [(3, 1, 4), (3, 4, 1), (3, 1, 0)]:
        with pytest.raises(ValueError, match="pass@"):
            metrics.pass_at_k(n, c, k)


def test_ties_of_choices_give_the_credit_of_a_fair_draw():
    assert metrics.choice_credit([1.0, 2.0], 0) == 1.0
    assert metrics.choice_credit([1.0, 2.0], 1) == 0.0
    assert metrics.choice_credit([1.0, 1.0, 1.0, 1.0], 2) == 0.25
    assert metrics.choice_credit([0.1 + 0.2, 0.3, 9.0], 1) == 0.5, "equal but for rounding"


def test_word_f1_and_exact_match_take_the_best_answer():
    assert metrics.word_f1("the cat sat", ["a dog", "cat sat down"]) == pytest.approx(2 * 2 / (2 + 3))
    assert metrics.word_f1("", [""]) == 1.0
    assert metrics.word_f1("x", []) == 0.0
    assert metrics.exact_match("The Beatles.", ["beatles", "stones"]) == 1.0
    assert metrics.exact_match("", ["the"]) == 1.0, "an article alone is normalised away on both sides"
    assert metrics.exact_match("", ["beatles"]) == 0.0


def test_average_precision_by_hand():
    # Ranked: right, wrong, right -> (1/1 + 2/3) / 2.
    assert metrics.average_precision([0.1, 0.2, 0.3], [1, 0, 1]) == pytest.approx((1 + 2 / 3) / 2)
    assert metrics.reciprocal_rank([0.3, 0.2, 0.1], [1, 0, 0]) == pytest.approx(1 / 3)
    assert metrics.average_precision([0.1], [0]) == 0.0
    assert metrics.reciprocal_rank([0.1], [0]) == 0.0


def test_ranking_with_ties_is_fair_over_seeds_and_fixed_for_a_seed():
    labels = [1, 0, 0, 0]
    values = [metrics.reciprocal_rank([1.0] * 4, labels, str(seed)) for seed in range(2000)]
    assert sum(values) / len(values) == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4, abs=0.02)
    assert metrics.reciprocal_rank([1.0] * 4, labels, "q") == metrics.reciprocal_rank([1.0] * 4, labels, "q")


def test_chrf_and_rouge_are_one_for_equal_texts_and_lower_for_others():
    for text in (
        "a",
        "The cat sat on the mat.",
        "Gr\u00fc\u00dfe aus K\u00f6ln",
        "\u4f60\u597d",
        "def f(x):\n    return x\n",
    ):
        assert metrics.chrf(text, text) == pytest.approx(1.0)
        assert metrics.rouge_l(text, text) == pytest.approx(1.0)
    assert metrics.chrf("xyz", "The cat") == 0.0
    assert metrics.rouge_l("the dog sat", "the cat sat") == pytest.approx(2 / 3)
    assert metrics.rouge_l("\u4f60", "\u4f60\u597d") == 0.0


def test_bits_per_byte_of_a_uniform_byte_model_is_eight():
    assert metrics.bits_per_byte(10 * math.log(256), 10) == pytest.approx(8.0)
    assert math.isnan(metrics.bits_per_byte(0.0, 0))


def test_the_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no values"):
        metrics.mean([])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 40), st.integers(1, 40))
def test_wilson_intervals_hold_the_share_and_stay_inside_zero_and_one(right, extra):
    total = right + extra
    low, high = metrics.wilson_interval(right, total)
    assert 0.0 <= low <= right / total <= high <= 1.0
    assert high - low > 0.0, "also at 0 and at all"


def test_bootstrap_intervals_cover_the_true_mean_about_95_times_in_100():
    draw = random.Random(0)
    hits = 0
    for trial in range(200):
        values = [draw.random() for _ in range(40)]
        low, high = metrics.bootstrap_interval(values, 200, seed=trial)
        hits += low <= 0.5 <= high
    assert 0.88 <= hits / 200 <= 0.99
    assert metrics.bootstrap_interval([0.5, 1.0], 100, 3) == metrics.bootstrap_interval([0.5, 1.0], 100, 3)
