from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hsmn_dist.config.models import HsmnConfig
from hsmn_dist.config.optim import OptimConfig
from hsmn_dist.config.training import TrainingConfig
from hsmn_dist.distributed.world import World
from hsmn_dist.foundation.errors import CheckpointError
from hsmn_dist.models.build import build_model
from hsmn_dist.training.build import build_engine
from hsmn_dist.training.export import export_weights, load_exported, load_weights

CONFIG = HsmnConfig(
    vocab_size=31, d_model=8, num_heads=2, d_feed_forward=12, num_encoder_layers=1, num_decoder_layers=1, chunk_size=4,
    chunk_stride=2, d_compressed=4, d_aggregator=6, aggregator_rank=2, window_size=4, max_target_tokens=16,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(4)
    engine = build_engine(TrainingConfig(engine="local"), OptimConfig(), lambda: build_model(CONFIG), World())
    return export_weights(engine, CONFIG, tmp_path / "weights", {"stage": "first"})


def test_what_is_exported_is_what_is_loaded(folder: Path) -> None:
    torch.manual_seed(4)
    wanted = dict(build_model(CONFIG).named_parameters())
    model = load_exported(folder)
    assert not model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, wanted[name]), name
    assert set(load_weights(folder)) == set(wanted)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["stage"] == "first" and manifest["num_parameters"] == sum(p.numel() for p in wanted.values())


def test_a_changed_byte_is_refused_before_it_is_read(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_exported(folder)


def test_a_folder_without_manifest_is_refused(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no manifest.json"):
        load_weights(folder)


def test_exporting_again_replaces_the_folder(folder: Path) -> None:
    engine = build_engine(TrainingConfig(engine="local"), OptimConfig(), lambda: build_model(CONFIG), World())
    export_weights(engine, CONFIG, folder)
    wanted = engine.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in load_weights(folder).items())
    assert [path.name for path in folder.parent.iterdir()] == ["weights"]
