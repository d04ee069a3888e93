"""Errors keep their three parts across process lines; registries suggest names; units read well."""

from __future__ import annotations

import pickle

import pytest

from hsmn_dist.foundation.errors import ConfigError, HsmnError, Preempted, StageFailed
from hsmn_dist.foundation.extras import require
from hsmn_dist.foundation.registry import Registry
from hsmn_dist.foundation.units import format_bytes, format_count, format_seconds


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("a", allowed="b", action="c"),
        Preempted("a", allowed="b", action="c"),
        StageFailed("a", allowed="b", action="c", kind="hung", rank=3),
    ],
)
def test_errors_survive_pickling(error: HsmnError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert again.__dict__ == error.__dict__
    assert str(again) == "a\n  allowed: b\n  do: c"


def test_exit_codes_are_the_documented_ones() -> None:
    assert (ConfigError.exit_code, StageFailed.exit_code, Preempted.exit_code) == (2, 1, 75)


def test_registry_refuses_duplicates_and_suggests_names() -> None:
    registry: Registry[int] = Registry("dataset")
    registry.register("gsm8k")(1)
    with pytest.raises(RuntimeError, match="twice"):
        registry.register("gsm8k")(2)
    with pytest.raises(ConfigError) as caught:
        registry.get("gsm8")
    assert "did you mean 'gsm8k'?" in caught.value.action
    registry.freeze()
    with pytest.raises(RuntimeError, match="frozen"):
        registry.register("late")(3)


def test_a_missing_package_names_its_install_command() -> None:
    with pytest.raises(HsmnError) as caught:
        require("lm_eval_that_does_not_exist")
    assert "pip install -c constraints.txt lm_eval_that_does_not_exist" in caught.value.action
    assert caught.value.exit_code == 2


def test_units_read_well() -> None:
    assert format_bytes(1536) == "1.5 KiB"
    assert format_bytes(3 * 2**50) == "3.0 PiB"
    assert format_count(1_500_000) == "1.5M"
    assert format_seconds(3723.4) == "1h02m03s"
    assert format_seconds(59.94) == "59.9s"
