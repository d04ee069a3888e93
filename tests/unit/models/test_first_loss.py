"""Loss at step 0 equals ln V within 5 percent for every run and study that ships, both files of a billion parameters included.

The quick tests take two blocks of the full width; the slow ones build the billions at full depth. The files of configs/models
(hybrid included) have the same test in unit/models/{hsmn,hope}/test_configs.py, variants that no file uses in test_model.py.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from hsmn_dist.config.load import load_run_config
from hsmn_dist.config.models import HopeConfig, ModelConfig
from hsmn_dist.models.build import build_model
from hsmn_dist.models.contract import ModelInput, cross_entropy
from hsmn_dist.planner.parameters import count_parameters

FOLDER = Path(__file__).resolve().parents[3] / "configs"
FILES = [path for room in ("runs", "studies") for path in sorted(FOLDER.glob(f"{room}/*.yaml"))]
FILES = [path for path in FILES if not path.stem.startswith("study_")]
WIDE = 600_000_000
"""Parameters from which a configuration counts as one of the 1B files."""


def model_config(path: Path) -> ModelConfig:
    """The architecture that a run file describes."""
    return load_run_config(path).model


def reduced(config: ModelConfig) -> ModelConfig:
    """At most two blocks of each kind, the widths and the vocabulary as they are."""
    names = ("num_layers",) if isinstance(config, HopeConfig) else ("num_encoder_layers", "num_decoder_layers")
    return config.model_copy(update={name: min(2, getattr(config, name)) for name in names})


def first_loss(config: ModelConfig) -> float:
    torch.manual_seed(0)
    model = build_model(config).eval()
    generator = torch.Generator().manual_seed(1)
    context = torch.randint(4, config.vocab_size, (1, getattr(config, "chunk_size", 8) + 1), generator=generator)
    target = torch.randint(4, config.vocab_size, (1, 12), generator=generator)
    inputs = ModelInput(context, torch.ones_like(context).bool(), target, torch.ones_like(target).bool())
    with torch.no_grad():
        nll = model(inputs, target_loss=cross_entropy).nll
    assert nll is not None
    return float(nll.mean())


def is_wide(path: Path) -> bool:
    return count_parameters(model_config(path)).total > WIDE


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_loss_at_step_0_is_ln_v_for_every_shipped_file(path: Path) -> None:
    config = reduced(model_config(path))
    assert first_loss(config) == pytest.approx(math.log(config.vocab_size), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["hope", "hsmn"])
def test_loss_at_step_0_is_ln_v_at_the_full_depth_of_a_billion_parameters(family: str) -> None:
    (path,) = [path for path in FILES if path.stem.startswith(f"{family}_large")]
    assert is_wide(path)
    config = model_config(path)
    assert first_loss(config) == pytest.approx(math.log(config.vocab_size), rel=0.05)


def test_two_of_the_shipped_runs_have_about_a_billion_parameters() -> None:
    assert {model_config(path).family for path in FILES if is_wide(path)} == {"hsmn", "hope"}
