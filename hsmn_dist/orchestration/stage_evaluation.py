"""Scores of every task of the curriculum, on exported weights, with the tasks dealt to the ranks.

The live engine is never used: generation under ZeRO-3 makes every forward a collective, and ranks that stop early would leave the
others waiting. Each rank holds a whole copy of the model here; the planner checks that it fits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from hsmn_dist.config.data import DataConfig
from hsmn_dist.config.evaluation import EvaluationConfig
from hsmn_dist.config.run import RunConfig
from hsmn_dist.data.example import Example
from hsmn_dist.data.shards.reader import read_examples
from hsmn_dist.data.tokenizer import load_tokenizer
from hsmn_dist.distributed.collectives import all_gather_objects
from hsmn_dist.distributed.world import World
from hsmn_dist.evaluation.runner import evaluate_task
from hsmn_dist.models.contract import LanguageModel
from hsmn_dist.models.text_model import LocalTextModel

Progress = Callable[[int, int], None]


def task_folders(config: RunConfig, prepared: dict[str, Any]) -> dict[str, list[Path]]:
    """Task name -> prepared folders of its datasets. Each stage of the curriculum is a task."""
    return {
        stage.name: [Path(prepared["folders"][dataset.key]) for dataset in stage.datasets]
        for stage in config.curriculum.stages
    }


def test_examples(folders: Sequence[Path], settings: EvaluationConfig, data: DataConfig) -> list[Example]:
    """The first test examples of a task's datasets, equally many of each."""
    share = -(-max(settings.num_examples, settings.num_loss_examples) // len(folders))
    return [example for folder in folders for example in _read(folder, "test", share, data)]


def training_shots(folders: Sequence[Path], count: int, data: DataConfig) -> list[Example]:
    """The first `count` training examples of a task, dealt over its datasets in turn."""
    share = -(-count // len(folders))
    rows = [list(_read(folder, "train", share, data)) for folder in folders] if count else []
    return [example for turn in zip_longest(*rows) for example in turn if example is not None][:count]


def _read(folder: Path, split: str, limit: int, data: DataConfig) -> Iterator[Example]:
    return read_examples(folder, split, limit, data.cache_folder, data.cache_bytes)


def evaluate_tasks(
    model: LanguageModel, config: RunConfig, prepared: dict[str, Any], world: World, progress: Progress
) -> dict[str, Any]:
    """Task name -> result (JSON). Every rank gets all results.

    Examples are the first ones of each task's test split, so the same weights give the same scores on any number of ranks.
    """
    text_model = LocalTextModel(
        model.to(world.device).eval(),
        load_tokenizer(Path(prepared["tokenizer"])),
        batch_examples=config.evaluation.batch_examples,
        max_context_tokens=config.data.max_context_tokens,
    )
    tasks = list(task_folders(config, prepared).items())
    mine: dict[str, Any] = {}
    for index, (name, folders) in enumerate(tasks):
        if index % world.world_size != world.rank:
            continue
        examples = test_examples(folders, config.evaluation, config.data)
        shots = training_shots(folders, config.evaluation.num_shots, config.data)
        mine[name] = evaluate_task(text_model, name, examples, config.evaluation, shots=shots).to_json()
        progress(index + 1, len(tasks))
    merged: dict[str, Any] = {}
    for part in all_gather_objects(mine):
        merged.update(part)
    return {name: merged[name] for name, _ in tasks}
