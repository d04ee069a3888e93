"""The shipped optimizer files are valid sections and build."""

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from hsmn_dist.config.optim import OptimConfig
from hsmn_dist.foundation.param_role import ParamRole
from hsmn_dist.optim.build import build_optimizer

FOLDER = Path(__file__).resolve().parents[3] / "configs" / "optim"
NAMES = ["adamw", "deep_momentum", "m3", "muon"]


@pytest.mark.parametrize("name", NAMES)
def test_shipped_file_builds_and_steps(name):
    config = OptimConfig(**yaml.safe_load((FOLDER / f"{name}.yaml").read_text()))
    layer = nn.Linear(3, 4)
    optimizer = build_optimizer(
        config, layer.named_parameters(), {"weight": ParamRole.MATRIX, "bias": ParamRole.VECTOR}
    )
    before = layer.weight.detach().clone()
    layer(torch.randn(2, 3)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, before)


def test_no_optimizer_file_is_forgotten():
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == NAMES
