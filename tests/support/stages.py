"""A whole training stage with the tiny model: parts for `training.loop.train`, with a stream that counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hsmn_dist.config.optim import OptimConfig
from hsmn_dist.config.training import TrainingConfig
from hsmn_dist.distributed.determinism import seed_everything
from hsmn_dist.distributed.shards import ParamShard
from hsmn_dist.distributed.world import World
from hsmn_dist.models.contract import ModelInput
from hsmn_dist.tracking.tracker import InMemoryTracker
from hsmn_dist.training.build import build_engine
from hsmn_dist.training.checkpoint import Checkpointer
from hsmn_dist.training.engine import Engine
from hsmn_dist.training.loop import TrainParts
from tests.support.models import TinyModel, rows_of, tiny_batch

NUM_EXAMPLES = 8
MICRO = 2
OPTIM = OptimConfig.model_validate({"optimizer": {"learning_rate": 0.02}})


@dataclass(frozen=True)
class Position:
    batches: int

    def to_json(self) -> dict[str, int]:
        return {"batches": self.batches}


class TinyStream:
    """Global batch b is `tiny_batch(b % num_distinct)` on any number of ranks; `poisoned` batches give a loss of NaN."""

    def __init__(self, world: World, cursor: dict[str, int] | None, num_distinct: int, seen: list[int]) -> None:
        self._world, self._num_distinct, self._seen = world, num_distinct, seen
        self._next = 0 if cursor is None else cursor["batches"]

    def __iter__(self) -> Iterator[list[ModelInput]]:
        each = NUM_EXAMPLES // self._world.world_size
        while True:
            batch = tiny_batch(self._next % self._num_distinct, NUM_EXAMPLES)
            self._seen.append(self._next)
            self._next += 1
            first = self._world.rank * each
            yield [rows_of(batch, start, start + MICRO) for start in range(first, first + each, MICRO)]

    def cursor(self) -> Position:
        return Position(self._next)


class QuadraticPull:
    """The simplest penalty: strength / 2 * |theta|^2."""

    def __init__(self, strength: float, is_proximal: bool = False) -> None:
        self.strength, self.is_proximal = strength, is_proximal

    def add_gradients(self, shards: list[ParamShard]) -> None:
        for shard in shards:
            assert shard.gradient is not None
            if not self.is_proximal:
                shard.gradient.add_(shard.value.to(shard.gradient.dtype), alpha=self.strength)

    def after_step(self, shards: list[ParamShard], learning_rate: float) -> bool:
        if self.is_proximal:
            for shard in shards:
                shard.value.div_(1 + learning_rate * self.strength)
        return self.is_proximal

    def local_value(self, shards: list[ParamShard]) -> Tensor:
        return sum((shard.value.square().sum() for shard in shards), torch.zeros(())) * self.strength / 2


def training_config(**changes: Any) -> TrainingConfig:
    values = {
        "engine": "local",
        "global_batch_examples": NUM_EXAMPLES,
        "micro_batch_examples": MICRO,
        "validate_every_steps": 4,
        "checkpoint_every_steps": 3,
        "log_every_steps": 2,
        "persistent_parameter_elements": 20,
    }
    return TrainingConfig.model_validate({**values, **changes})


@dataclass
class TinyStage:
    """Everything of one process's attempt at a stage; a second one over the same folder resumes it."""

    folder: Path
    world: World
    training: TrainingConfig
    num_steps: int = 12
    dropout: float = 0.2
    num_distinct: int = 5
    seen: list[int] = field(default_factory=list)
    tracker: InMemoryTracker = field(default_factory=InMemoryTracker)
    engine: Engine | None = None

    def parts(self, **changes: Any) -> TrainParts:
        seed_everything(11)
        self.engine = build_engine(self.training, OPTIM, lambda: TinyModel(dropout=self.dropout), self.world)
        seed_everything(11, self.world.rank)
        each = NUM_EXAMPLES // self.world.world_size
        first = self.world.rank * each
        values: dict[str, Any] = {
            "engine": self.engine,
            "world": self.world,
            "training": self.training,
            "num_steps": self.num_steps,
            "learning_rate": lambda step: 0.02 * (1 - step / (2 * self.num_steps)),
            "open_stream": lambda cursor: TinyStream(self.world, cursor, self.num_distinct, self.seen),
            "validation_batches": lambda: [rows_of(tiny_batch(1000, NUM_EXAMPLES), first, first + each)],
            "checkpointer": Checkpointer(self.folder, self.world, self.training.keep_last_checkpoints),
            "tracker": self.tracker,
            "penalty": QuadraticPull(0.05),
        }
        return TrainParts(**{**values, **changes})


def one_rank_engine(folder: Path) -> Engine:
    """The engine of a tiny stage on one rank."""
    return TinyStage(folder, World(), training_config(global_batch_examples=2)).parts().engine


def train_a_step(engine: Engine, seed: int) -> None:
    """One optimizer step on a batch of its own."""
    engine.forward_backward(tiny_batch(seed, 2), 5)
    engine.step(0.01)
