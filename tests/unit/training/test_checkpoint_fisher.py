"""A Fisher of weights from elsewhere: measured on a prepared folder, stored as the first task."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hsmn_dist.config.continual import FisherConfig
from hsmn_dist.config.models import HsmnConfig
from hsmn_dist.continual.store import load_store, read_manifest
from hsmn_dist.distributed.world import World
from hsmn_dist.foundation.errors import CheckpointError, DataError
from hsmn_dist.models.build import build_model
from hsmn_dist.training.checkpoint_fisher import save_fisher_of_weights
from tests.support.fisher import _HSMN, engine_of
from tests.support.param_shards import shards_of
from tests.support.shards import write_folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "demo", 7)


def model(vocab_size: int = 260):
    torch.manual_seed(0)
    return build_model(HsmnConfig(**{**_HSMN, "vocab_size": vocab_size, "max_target_tokens": 64}))


def test_the_store_holds_the_fisher_and_the_weights_as_anchor(data: Path, tmp_path: Path) -> None:
    config = FisherConfig(estimator="sampled", num_fisher_examples=5, micro_batch_examples=2, seed=3)
    seen = []
    facts = save_fisher_of_weights(
        model(), data, config, tmp_path / "fisher", name="base", progress=lambda done, of: seen.append((done, of))
    )
    manifest = read_manifest(tmp_path / "fisher")
    assert manifest["tasks"] == [facts["task"]] and facts["task"]["estimator"] == "sampled"
    assert facts["task"]["num_examples"] == 5 and facts["task"]["seed"] == 3 and seen[-1] == (5, 5)
    assert facts["num_parameters"] == manifest["num_parameters"] and facts["fisher_sum"] > 0
    weights = model().state_dict()
    loaded = load_store(tmp_path / "fisher", shards_of({n: p for n, p in model().named_parameters()}))
    assert all(torch.equal(kept.centre, weights[kept.name].view(-1)) for kept in loaded.shards)
    with pytest.raises(CheckpointError, match="holds a Fisher already"):
        save_fisher_of_weights(model(), data, config, tmp_path / "fisher")


def test_missing_data_and_another_models_store_are_refused(data: Path, tmp_path: Path) -> None:
    config = FisherConfig(num_fisher_examples=2)
    with pytest.raises(DataError):
        save_fisher_of_weights(model(), tmp_path / "nothing", config, tmp_path / "fisher")
    save_fisher_of_weights(model(), data, config, tmp_path / "fisher")
    with pytest.raises(CheckpointError, match="differ"):
        load_store(tmp_path / "fisher", engine_of("hope", World()).param_shards(False))
