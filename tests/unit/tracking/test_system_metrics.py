"""The machine's state: taken when it is due, under the names that MLflow's page of system metrics knows."""

from __future__ import annotations

import math
import time

from hsmn_dist.tracking.system_metrics import SystemSampler


def test_samples_are_plausible_and_named_as_mlflow_names_them():
    sampler = SystemSampler(60.0)
    values = sampler.sample_if_due()
    assert all(name.startswith("system/") and math.isfinite(value) for name, value in values.items())
    assert 0.0 <= values["system/cpu_utilization_percentage"] <= 100.0
    assert 0.0 < values["system/system_memory_usage_percentage"] <= 100.0
    assert 5.0 < values["system/process_memory_megabytes"] < values["system/system_memory_usage_megabytes"] * 2
    assert abs(sampler.step - time.time()) < 5, "the step is the time, so that it rises over restarts"


def test_nothing_is_taken_before_it_is_due_or_when_it_is_off():
    sampler = SystemSampler(60.0)
    assert sampler.sample_if_due()
    assert sampler.sample_if_due() == {}
    assert SystemSampler(0.0).sample_if_due() == {}
