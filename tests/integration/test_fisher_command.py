"""`hsmn-dist fisher` on a tiny exported model: options, the store that it leaves, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hsmn_dist.cli.main import run_command
from hsmn_dist.config.models import HsmnConfig
from hsmn_dist.config.optim import OptimConfig
from hsmn_dist.config.training import TrainingConfig
from hsmn_dist.continual.store import read_manifest
from hsmn_dist.data.tokenizer import TOKENIZER_NAME, ByteTokenizer
from hsmn_dist.distributed.world import World
from hsmn_dist.models.build import build_model
from hsmn_dist.training.build import build_engine
from hsmn_dist.training.export import export_weights
from tests.support.fisher import _HSMN
from tests.support.shards import write_folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = HsmnConfig(**{**_HSMN, "vocab_size": ByteTokenizer().vocab_size, "max_target_tokens": 64})
    torch.manual_seed(0)
    engine = build_engine(TrainingConfig(engine="local"), OptimConfig(), lambda: build_model(config), World())
    folder = tmp_path_factory.mktemp("model") / "weights"
    export_weights(engine, config, folder, {})
    ByteTokenizer().save(folder / TOKENIZER_NAME)
    engine.close()
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "demo", 7, splits=("validation",))


def test_the_command_writes_a_store_and_says_what_it_measured(
    weights: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["fisher", str(weights), "--data", str(data), "--out", str(tmp_path / "store"), "--name", "base"]
    choices = {"--estimator": "signed_sum", "--num-examples": "6", "--num-groups": "3", "--micro-batch": "2"}
    choices |= {"--reduction": "sum", "--seed": "4", "--split": "validation"}
    assert run_command([*command, *(word for choice in choices.items() for word in choice)]) == 0
    facts = json.loads(capsys.readouterr().out)
    task = read_manifest(tmp_path / "store")["tasks"][0]
    assert facts["task"] == task and task["stage"] == "base" and task["estimator"] == "signed_sum"
    assert (task["num_examples"], task["num_groups"], task["seed"]) == (6, 3, 4)
    assert task["example_reduction"] == "sum" and facts["fisher_sum"] > 0


def test_data_of_another_tokenizer_and_unknown_words_are_bad_input(
    weights: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["fisher", str(weights), "--out", str(tmp_path / "store")]
    other = write_folder(tmp_path / "other", 4)
    index = json.loads((other / "index.json").read_text())
    (other / "index.json").write_text(json.dumps({**index, "tokenizer_digest": "0" * 64}))
    assert run_command([*command, "--data", str(other)]) == 2
    assert "tokens of tokenizer 000000000000" in capsys.readouterr().err
    assert run_command([*command, "--data", str(data), "--reduction", "median"]) == 2
    assert run_command([*command, "--data", str(data), "--split", "test"]) == 2
    assert not (tmp_path / "store").exists()
