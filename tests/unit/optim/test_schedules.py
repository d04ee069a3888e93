"""The learning rate is a pure function of the step."""

import pytest

from hsmn_dist.config.optim import ScheduleConfig
from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.optim.schedules import learning_rate


def test_warmup_rises_linearly_to_the_peak_and_never_wastes_step_zero():
    config = ScheduleConfig(kind="cosine", warmup_steps=4)
    assert [learning_rate(config, 8.0, s, 100) for s in range(4)] == [2.0, 4.0, 6.0, 8.0]
    assert learning_rate(config, 8.0, 4, 100) == 8.0


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_last_step_has_the_final_fraction_of_the_peak(kind):
    config = ScheduleConfig(kind=kind, warmup_steps=3, final_fraction=0.25)
    assert learning_rate(config, 2.0, 19, 20) == pytest.approx(0.5)
    assert learning_rate(config, 2.0, 500, 20) == pytest.approx(0.5)


def test_cosine_and_linear_are_half_way_down_in_the_middle():
    for kind in ("linear", "cosine"):
        config = ScheduleConfig(kind=kind, warmup_steps=0, final_fraction=0.0)
        assert learning_rate(config, 1.0, 50, 101) == pytest.approx(0.5)


def test_rates_fall_monotonically_after_warmup():
    config = ScheduleConfig(kind="cosine", warmup_steps=5)
    rates = [learning_rate(config, 1.0, s, 60) for s in range(5, 60)]
    assert rates == sorted(rates, reverse=True)


def test_constant_stays_at_the_peak():
    config = ScheduleConfig(kind="constant", warmup_steps=0)
    assert {learning_rate(config, 3.0, s, 7) for s in range(7)} == {3.0}


def test_one_step_stage_and_stage_shorter_than_its_warmup_have_positive_rates():
    assert learning_rate(ScheduleConfig(warmup_steps=0), 1.0, 0, 1) > 0
    assert learning_rate(ScheduleConfig(warmup_steps=10), 1.0, 2, 3) == pytest.approx(0.3)


def test_negative_step_is_refused_with_the_three_parts():
    with pytest.raises(ModelError, match="allowed"):
        learning_rate(ScheduleConfig(), 1.0, -1, 10)
