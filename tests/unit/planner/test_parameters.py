from __future__ import annotations

from pathlib import Path

import pytest

from hsmn_dist.config.load import load_run_config
from hsmn_dist.models.build import build_model
from hsmn_dist.planner.parameters import count_parameters
from tests.support.planner import MODELS

RUNS = Path(__file__).resolve().parents[3] / "configs" / "runs"


@pytest.mark.parametrize("name", sorted(MODELS))
def test_counts_equal_those_of_the_built_model(name: str) -> None:
    count = count_parameters(MODELS[name])
    model = build_model(MODELS[name])
    assert count.sizes == tuple(parameter.numel() for parameter in model.parameters())
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    assert sum(count.by_component.values()) == count.total
    assert count.num_blocks == len(model.blocks)


@pytest.mark.parametrize("family", ["hsmn", "hope"])
def test_the_large_runs_have_about_a_billion_parameters(family: str) -> None:
    config = load_run_config(RUNS / f"{family}_large_builtin_multi_node.yaml")
    assert 0.95e9 < count_parameters(config.model).total < 1.05e9


def test_pieces_of_equal_size_are_padded_for_each_parameter() -> None:
    count = count_parameters(MODELS["hope"])
    assert count.padded(1) == count.total
    assert count.padded(7) == sum((size + 6) // 7 * 7 for size in count.sizes) > count.total
    assert count.at_most(0) == 0
    assert count.at_most(max(count.sizes)) == count.total
