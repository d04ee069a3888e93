from __future__ import annotations

import math
import random

import pytest

from hsmn_dist.config.training import TrainingConfig
from hsmn_dist.foundation.errors import StageFailed
from hsmn_dist.training.trouble import check_budget, is_spike, judge

CALM = [2.0 + 0.01 * math.sin(i) for i in range(128)]


def test_a_loss_six_sigma_above_the_recent_ones_is_a_spike() -> None:
    assert is_spike(2.1, CALM, 6.0, 128)
    assert not is_spike(2.03, CALM, 6.0, 128)
    assert not is_spike(1.0, CALM, 6.0, 128), "a fall is no spike"


def test_nothing_is_a_spike_before_half_a_window() -> None:
    assert not is_spike(100.0, CALM[:63], 6.0, 128)
    assert is_spike(100.0, CALM[:64], 6.0, 128)


def test_only_the_window_counts() -> None:
    assert is_spike(2.1, [*[1000.0, 0.0] * 50, *CALM], 6.0, 128)


def test_ordinary_noise_is_seldom_a_spike() -> None:
    generator = random.Random(0)
    losses = [generator.gauss(3.0, 0.2) for _ in range(3000)]
    assert sum(is_spike(losses[i], losses[i - 128 : i], 6.0, 128) for i in range(128, 3000)) == 0


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_follows_its_policy(loss: float, norm: float) -> None:
    with pytest.raises(StageFailed) as caught:
        judge(TrainingConfig(), 7, loss, norm, [])
    assert caught.value.kind == "non_finite" and "step 7" in caught.value.found
    assert judge(TrainingConfig(on_non_finite="skip"), 7, loss, norm, []) == "skip"
    assert judge(TrainingConfig(on_non_finite="rollback"), 7, loss, norm, []) == "rollback"


def test_a_spike_follows_its_own_policy_and_is_ignored_by_default() -> None:
    assert judge(TrainingConfig(), 0, 9.0, 1.0, CALM) == "go_on"
    assert judge(TrainingConfig(on_loss_spike="skip"), 0, 9.0, 1.0, CALM) == "skip"
    assert judge(TrainingConfig(on_loss_spike="rollback"), 0, 9.0, 1.0, CALM) == "rollback"
    assert judge(TrainingConfig(on_loss_spike="skip"), 0, 2.0, 1.0, CALM) == "go_on"
    with pytest.raises(StageFailed, match="loss 9 after a mean of") as stopped:
        judge(TrainingConfig(on_loss_spike="stop"), 0, 9.0, 1.0, CALM)
    assert stopped.value.kind == "loss_spike"


@pytest.mark.parametrize(("is_finite", "kind"), [(True, "loss_spike"), (False, "non_finite")])
def test_the_budget_is_exact_and_names_what_spent_it(is_finite: bool, kind: str) -> None:
    check_budget(TrainingConfig(max_skipped_steps=2), 5, 2, is_finite)
    with pytest.raises(StageFailed, match="3 steps") as stopped:
        check_budget(TrainingConfig(max_skipped_steps=2), 5, 3, is_finite)
    assert stopped.value.kind == kind
