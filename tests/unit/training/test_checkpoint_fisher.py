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


def test_a_fisher_that_was_killed_does_not_go_on_with_other_data_or_another_split(data: Path, tmp_path: Path) -> None:
    """The files have the same names and numbers of examples; only the index tells them apart."""
    other = write_folder(tmp_path / "other", 7, name="elsewhere", splits=("train", "test"))
    config = FisherConfig(estimator="sampled", num_fisher_examples=6, micro_batch_examples=2, save_every_batches=1)

    def killed(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    def measured(folder: Path, split: str, out: str) -> tuple[list[int], float]:
        seen: list[int] = []
        facts = save_fisher_of_weights(
            model(), folder, config, tmp_path / out, split=split, progress=lambda done, total: seen.append(done)
        )
        return seen, facts["fisher_sum"]

    for folder, split in ((other, "train"), (other, "test")):
        with pytest.raises(KeyboardInterrupt):
            save_fisher_of_weights(model(), data, config, tmp_path / f"out_{split}", progress=killed)
        assert measured(folder, split, f"out_{split}") == ([2, 4, 6], measured(folder, split, f"new_{split}")[1])
    with pytest.raises(KeyboardInterrupt):
        save_fisher_of_weights(model(), data, config, tmp_path / "same", progress=killed)
    assert measured(data, "train", "same")[0] == [4, 6]
