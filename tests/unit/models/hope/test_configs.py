"""The shipped HOPE configurations: the parameter count in the header is the built model's; loss at step 0 is ln V."""

import math
import re
from pathlib import Path

import pytest
import torch
import yaml

from hsmn_dist.config.models import HopeConfig
from hsmn_dist.models.contract import cross_entropy
from hsmn_dist.models.hope.model import HopeModel
from tests.support.hope_models import batch

FOLDER = Path(__file__).resolve().parents[4] / "configs" / "models"
FILES = sorted(FOLDER.glob("hope_*.yaml"))
every_file = pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)


def _config(path) -> HopeConfig:
    return HopeConfig(**yaml.safe_load(path.read_text()))


@every_file
def test_header_states_the_exact_parameter_count(path):
    stated = re.search(r"([\d,]+) parameters", path.read_text().splitlines()[0])
    assert stated is not None
    with torch.device("meta"):
        model = HopeModel(_config(path))
    assert int(stated[1].replace(",", "")) == sum(p.numel() for p in model.parameters())


@every_file
def test_loss_at_step_zero_is_ln_v_within_five_percent(path):
    # Depth only lowers the share of each block in the stream, so two blocks of the full width decide.
    config = _config(path)
    config = config.model_copy(update={"num_layers": min(2, config.num_layers)})
    torch.manual_seed(0)
    model = HopeModel(config)
    inputs = batch([8], [8], vocab_size=config.vocab_size)
    nll = model(inputs, target_loss=cross_entropy).nll.detach()
    assert float(nll.mean()) == pytest.approx(math.log(config.vocab_size), rel=0.05)


def test_the_four_sizes_are_there():
    assert {"hope_debug", "hope_small", "hope_base", "hope_large"} <= {p.stem for p in FILES}
