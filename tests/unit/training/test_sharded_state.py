"""What needs several ranks: resharding between world sizes and ZeRO stages, pruning on shards, a rank that cannot save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hsmn_dist.config.models import PruningConfig
from hsmn_dist.distributed.world import World
from hsmn_dist.foundation.errors import CheckpointError
from hsmn_dist.models.pruning import measured_sparsity
from hsmn_dist.training.checkpoint import Checkpointer, TrainState
from hsmn_dist.training.loop import TrainParts, train
from hsmn_dist.training.sparsity import PruningMask
from tests.support.distributed import run_distributed
from tests.support.stages import TinyStage, training_config

PRUNING = PruningConfig(schedule="gradual", sparsity=0.4, begin_step=1, end_step=9, every_steps=3)
PRUNABLE = ["layers.0.wide.weight", "head.weight"]
ROUTE = [(2, 2), (1, 3), (4, 1), (2, 2)]
"""World size and ZeRO stage of each part of the way."""


def tiny_stage(folder: str, world: World, num_steps: int, **changes: Any) -> TinyStage:
    return TinyStage(Path(folder), world, training_config(**changes), num_steps, dropout=0.0)


def _prune(world: World, folder: str, zero_stage: int) -> dict[str, torch.Tensor]:
    settings = {"engine": "deepspeed" if world.world_size > 1 else "local", "zero_stage": zero_stage}

    def run(path: str, **changes: Any) -> dict[str, torch.Tensor]:
        tiny = tiny_stage(path, world, 12, **settings)
        parts = tiny.parts(**changes)
        parts.mask = PruningMask(PRUNING, PRUNABLE, parts.engine.num_shard_copies)
        train(parts)
        return parts.engine.state_dict()

    weights = run(f"{folder}/whole{zero_stage}")

    def die(done: int, *_: Any) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(f"{folder}/broken{zero_stage}", on_step=die)
    resumed = run(f"{folder}/broken{zero_stage}")
    assert all(torch.equal(resumed[name], weights[name]) for name in weights), "masks survive a resume"
    return weights


def _cannot_save(world: World, folder: str) -> str:
    """Rank 1 fails to write; both ranks learn of it, and the earlier checkpoint stays."""
    tiny = tiny_stage(folder, world, 2, engine="deepspeed", zero_stage=1)
    parts: TrainParts = tiny.parts()
    Checkpointer(Path(folder), world).save(parts.engine, TrainState(step=1))
    if world.rank == 1:
        parts.engine.snapshot = lambda: ({"bad": "not a tensor"}, "")  # type: ignore[assignment, method-assign, return-value]
    try:
        Checkpointer(Path(folder), world).save(parts.engine, TrainState(step=2))
    except CheckpointError as error:
        message = str(error)
    except Exception as error:
        message = f"own {error}"
    newest = Checkpointer(Path(folder), world).newest()
    assert newest is not None and newest.name == "step_00000001"
    return message


def _on_two_ranks(world: World, folder: str) -> dict[str, Any]:
    results: dict[str, Any] = {f"prune{stage}": _prune(world, f"{folder}/prune", stage) for stage in (1, 3)}
    results["message"] = _cannot_save(world, f"{folder}/full")
    results["part0"] = _part(world, f"{folder}/route", 0)
    return results


def _part(world: World, folder: str, index: int) -> list[float]:
    """Steps 3 * index to 3 * index + 3 of a stage of 12, resumed from whatever saved before."""
    _, zero_stage = ROUTE[index]
    losses: list[float] = []

    def on_step(done: int, loss: float | None, *_: Any) -> None:
        assert loss is not None
        losses.append(loss)

    tiny = tiny_stage(folder, world, 12, engine="deepspeed", zero_stage=zero_stage)
    try:
        train(tiny.parts(on_step=on_step, should_stop=lambda: len(losses) == 3))
    except Exception as error:
        assert type(error).__name__ == "Preempted", error
    return losses


def test_pruning_a_rank_that_cannot_save_and_a_walk_over_world_sizes(tmp_path: Path) -> None:
    first, second = run_distributed(_on_two_ranks, 2, str(tmp_path), timeout=300)
    wanted = _prune(World(), str(tmp_path / "local"), 0)
    for stage in (1, 3):
        found = first[f"prune{stage}"]
        assert all(torch.equal(found[name], second[f"prune{stage}"][name]) for name in found)
        for name in wanted:
            assert (found[name] - wanted[name]).abs().max() < 1e-5, name
            assert torch.equal(found[name] == 0, wanted[name] == 0), name
    zeros = measured_sparsity(wanted, PRUNABLE)
    assert all(share == pytest.approx(0.4, abs=0.02) for share in zeros.values())
    assert "rank 1" in first["message"] and second["message"].startswith("own")

    losses = first["part0"]
    for index, (world_size, _) in list(enumerate(ROUTE))[1:]:
        if world_size == 1:
            losses = losses + _part(World(), str(tmp_path / "route"), index)
        else:
            losses = losses + run_distributed(_part, world_size, str(tmp_path / "route"), index, timeout=300)[0]
    undisturbed: list[float] = []
    tiny = tiny_stage(str(tmp_path / "undisturbed"), World(), 12)
    train(tiny.parts(on_step=lambda done, loss, _: undisturbed.append(loss)))
    assert len(losses) == 12
    assert max(abs(a - b) for a, b in zip(losses, undisturbed, strict=True)) < 1e-5
