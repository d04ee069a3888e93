"""The shipped HSMN configurations: the parameter count in the header is the built model's; loss at step 0 is ln V."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import TypeAdapter

from hsmn_dist.config.models import HsmnConfig, ModelConfig
from hsmn_dist.models.build import build_model
from hsmn_dist.models.contract import cross_entropy
from hsmn_dist.models.hsmn.model import HsmnModel
from tests.support.hsmn_models import batch

FOLDER = Path(__file__).resolve().parents[4] / "configs" / "models"
FILES = sorted(FOLDER.glob("hsmn_*.yaml"))
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def config_of(path: Path) -> HsmnConfig:
    return TypeAdapter(ModelConfig).validate_python(yaml.safe_load(path.read_text()))


@every_file
def test_header_states_the_exact_parameter_count(path):
    stated = re.search(r"([\d,]+) parameters", path.read_text().splitlines()[0])
    assert stated is not None
    with torch.device("meta"):
        model = HsmnModel(config_of(path))
    assert int(stated[1].replace(",", "")) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] * (p.stem == "hsmn_large")) for p in FILES]
)
def test_loss_at_step_zero_is_ln_v_within_five_percent(path):
    # Depth only lowers the share of each block in the stream, so two blocks of the full width decide.
    config = config_of(path)
    config = config.model_copy(
        update={
            "num_encoder_layers": min(1, config.num_encoder_layers),
            "num_decoder_layers": min(2, config.num_decoder_layers),
        }
    )
    torch.manual_seed(0)
    model = build_model(config)
    inputs = batch([config.chunk_size + 1], [8], vocab_size=config.vocab_size)
    with torch.no_grad():
        nll = model(inputs, target_loss=cross_entropy).nll
    assert float(nll.mean()) == pytest.approx(math.log(config.vocab_size), rel=0.05)


def test_the_four_sizes_and_the_hybrid_are_there():
    assert {"hsmn_debug", "hsmn_small", "hsmn_base", "hsmn_large", "hsmn_hope_debug"} <= {path.stem for path in FILES}
