"""Which split a stage reads for what: it learns from training rows, stops early by validation rows, and measures its Fisher on training rows.

The original measured the Fisher on the split that it also stopped early by.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hsmn_dist.config.run import RunConfig
from hsmn_dist.data.stream.plan import StreamSettings
from hsmn_dist.distributed.world import World
from hsmn_dist.orchestration import stage_training
from hsmn_dist.orchestration.run_folder import StageFolder
from hsmn_dist.orchestration.stage_training import StageTraining

CONFIG = RunConfig.model_validate(
    {
        "name": "splits",
        "model": {"family": "hsmn"},
        "training": {"engine": "local"},
        "data": {"cache_folder": "/our/cache"},
        "curriculum": {"stages": [{"name": "one", "datasets": [{"name": "passkey", "label": "short"}]}]},
    }
)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(what was opened, split), in order."""
    calls: list[tuple[str, str]] = []

    def iter_split(folder: Path, split: str, *_: Any, settings: StreamSettings, **__: Any) -> Iterator[Any]:
        assert settings.cache_folder == "/our/cache", "folders at URLs go through the configured cache"
        calls.append((folder.name, split))
        return iter(())

    monkeypatch.setattr(stage_training, "iter_split", iter_split)
    monkeypatch.setattr(
        stage_training, "build_loader", lambda sources, split, *a: calls.append((sources[0].folder.name, split))
    )
    return calls


def stage() -> Any:
    made = StageTraining.__new__(StageTraining)
    made._config, made._stages, made._stage = CONFIG, CONFIG.curriculum.stages, CONFIG.curriculum.stages[0]
    made._spec = SimpleNamespace(index=0, name="one")
    heart = SimpleNamespace(beat=lambda **changes: None, wait=lambda: None)
    made._context = SimpleNamespace(world=World(), prepared={"folders": {"short": "/data/short"}}, heart=heart)
    made._folder, made._num_steps = StageFolder(Path("stage")), 1
    return made


def test_learning_and_the_fisher_read_training_rows_and_early_stopping_reads_validation_rows(
    opened: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = stage()
    training._open_stream(None)
    list(training._validation_batches())
    monkeypatch.setattr(training, "_counts", lambda *_: iter([4]))
    monkeypatch.setattr(stage_training, "run_fisher", lambda engine, batches, *rest: list(batches))
    tracker = SimpleNamespace(log_metrics=lambda values, step: None)
    training._fisher(SimpleNamespace(module=torch.nn.Linear(1, 1)), tracker)
    assert opened == [("short", "train"), ("short", "validation"), ("short", "train")]
