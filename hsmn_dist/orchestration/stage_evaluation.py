"""Scores of every task of the curriculum, on exported weights, with the tasks dealt to the ranks.

The live engine is never used: generation under ZeRO-3 makes every forward a collective, and ranks that stop early would leave the
others waiting. Each rank holds a whole copy of the model here; the planner checks that it fits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from hsmn_dist.config.data import DataConfig
from hsmn_dist.config.evaluation import EvaluationConfig
from hsmn_dist.config.run import RunConfig
from hsmn_dist.data.example import Example
from hsmn_dist.data.shards.reader import read_examples
from hsmn_dist.data.tokenizer import load_tokenizer
from hsmn_dist.distributed.collectives import all_gather_objects
from hsmn_dist.distributed.world import World
from hsmn_dist.evaluation.runner import evaluate_task
from hsmn_dist.foundation.errors import Preempted
from hsmn_dist.models.contract import LanguageModel
from hsmn_dist.models.text_model import LocalTextModel

LOOK_SECONDS = 0.25


@dataclass(frozen=True)
class Watchers:
    """Who is told how the evaluation goes on.

    Attributes:
        progress: called with the tasks done and all tasks, after each of this rank.
        alive: called several times a second from within the model; may raise `Preempted`.
        waits: called when this rank has done its tasks and the others have not.
    """

    progress: Callable[[int, int], None]
    alive: Callable[[], None]
    waits: Callable[[], None]


def task_folders(config: RunConfig, prepared: dict[str, Any]) -> dict[str, list[Path]]:
    """Task name -> prepared folders of its datasets. Each stage of the curriculum is a task."""
    return {
        stage.name: [Path(prepared["folders"][dataset.key]) for dataset in stage.datasets]
        for stage in config.curriculum.stages
    }


def test_examples(folders: Sequence[Path], settings: EvaluationConfig, data: DataConfig) -> list[Example]:
    """The first test examples of a task's datasets, equally many of each."""
    share = -(-max(settings.num_examples, settings.num_loss_examples) // len(folders))
    return [example for folder in folders for example in read_examples(folder, "test", share, data)]


def training_shots(folders: Sequence[Path], count: int, data: DataConfig) -> list[Example]:
    """The first `count` training examples of a task, dealt over its datasets in turn."""
    share = -(-count // len(folders))
    rows = [list(read_examples(folder, "train", share, data)) for folder in folders] if count else []
    return [example for turn in zip_longest(*rows) for example in turn if example is not None][:count]


def evaluate_tasks(
    model: LanguageModel, config: RunConfig, prepared: dict[str, Any], world: World, watchers: Watchers
) -> dict[str, Any]:
    """Task name -> result (JSON). Every rank gets all results.

    Examples are the first ones of each task's test split, so the same weights give the same scores on any number of ranks.

    Raises:
        Preempted: on every rank, when one of them was asked to leave.
    """
    text_model = LocalTextModel(
        model.to(world.device).eval(),
        load_tokenizer(Path(prepared["tokenizer"])),
        batch_examples=config.evaluation.batch_examples,
        max_context_tokens=config.data.max_context_tokens,
    )
    tasks = list(task_folders(config, prepared).items())
    mine: dict[str, Any] = {}
    asked: Preempted | None = None
    try:
        with _told_of_every_forward(model, watchers.alive):
            for index, (name, folders) in enumerate(tasks):
                if index % world.world_size != world.rank:
                    continue
                examples = test_examples(folders, config.evaluation, config.data)
                shots = training_shots(folders, config.evaluation.num_shots, config.data)
                mine[name] = evaluate_task(text_model, name, examples, config.evaluation, shots=shots).to_json()
                watchers.progress(index + 1, len(tasks))
    except Preempted as error:
        asked = error  # told below: a rank that left alone would look to the others like one that was lost
    watchers.waits()
    parts = all_gather_objects((mine, asked))
    for _, preempted in parts:
        if preempted is not None:
            raise preempted
    merged = {name: result for part, _ in parts for name, result in part.items()}
    return {name: merged[name] for name, _ in tasks}


@contextmanager
def _told_of_every_forward(model: LanguageModel, alive: Callable[[], None]) -> Iterator[None]:
    """Call `alive` while the model works: a task may take longer than the silence that counts as a hang.

    Every forward pass and every generated token looks tokens up in an embedding; a look at the clock there costs nothing.
    """
    next_look = 0.0

    def look(*_: Any) -> None:
        nonlocal next_look
        if time.monotonic() >= next_look:
            next_look = time.monotonic() + LOOK_SECONDS
            alive()

    modules = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    hooks = [module.register_forward_pre_hook(look) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
