"""What a checkpoint holds beside weights: early stopping, the best weights, level clocks, and each rank's random state."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from hsmn_dist.distributed.determinism import seed_everything
from hsmn_dist.distributed.world import World
from hsmn_dist.foundation.param_role import ParamUpdate
from hsmn_dist.training.build import build_engine
from hsmn_dist.training.checkpoint import Checkpointer, TrainState
from hsmn_dist.training.engine import Engine
from hsmn_dist.training.loop import TrainParts, train
from tests.support.distributed import run_distributed
from tests.support.models import TinyModel, tiny_batch
from tests.support.stages import OPTIM, TinyStage, training_config


class Killed(RuntimeError):
    """Stands for a kill: nothing of the program runs after it."""


def die_at(step: int) -> Any:
    def on_step(done: int, loss: float | None, tokens_per_second: float | None) -> None:
        if done == step:
            raise Killed

    return on_step


def test_patience_and_the_best_weights_survive_a_kill_after_any_step(tmp_path: Path) -> None:
    def parts(name: str, **changes: Any) -> TrainParts:
        tiny = TinyStage(
            tmp_path / name, World(), training_config(validate_every_steps=1, checkpoint_every_steps=1, patience=3), 50
        )
        # The rate changes its sign, so that the loss gets worse from the fifth step on.
        return tiny.parts(learning_rate=lambda step: 0.02 if step < 4 else -0.02, **changes)

    whole = parts("whole")
    wanted = train(whole)
    assert wanted.stopped_early and wanted.num_steps == wanted.best_step + 3
    for step in range(1, wanted.num_steps):
        with pytest.raises(Killed):
            train(parts("broken", on_step=die_at(step)))
    resumed = parts("broken")
    found = train(resumed)
    assert dataclasses.replace(found, seconds=0) == dataclasses.replace(wanted, seconds=0)
    best, ours = whole.engine.state_dict(), resumed.engine.state_dict()
    assert all(torch.equal(ours[name], best[name]) for name in best), "it ends with the best weights, not with the last"


def test_level_clocks_go_on_in_the_middle_of_a_period(tmp_path: Path) -> None:
    slow = [name for name, _ in TinyModel().named_parameters()][:2]

    def engine(world: World) -> Engine:
        seed_everything(5)
        return build_engine(
            training_config(), OPTIM, TinyModel, world, updates=dict.fromkeys(slow, ParamUpdate(4, 0.5))
        )

    def steps(one: Engine, first: int, last: int) -> None:
        for step in range(first, last):
            one.forward_backward(tiny_batch(step, 8), 20)
            one.step(0.01)

    whole = engine(World())
    start = whole.state_dict()
    steps(whole, 0, 3)
    assert all(torch.equal(whole.state_dict()[name], start[name]) for name in slow), "the slow level waits"
    steps(whole, 3, 11)
    wanted = whole.state_dict()
    assert not any(torch.equal(wanted[name], start[name]) for name in slow)
    for cut in range(1, 11):
        keeper = Checkpointer(tmp_path / str(cut), World())
        before = engine(World())
        steps(before, 0, cut)
        keeper.save(before, TrainState(step=cut))
        after = engine(World())
        Checkpointer(tmp_path / str(cut), World()).restore(after)
        steps(after, cut, 11)
        found = after.state_dict()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), f"cut after step {cut}"


def _draw(world: World, folder: str) -> tuple[list[float], list[float]]:
    seed_everything(3, world.rank)
    tiny = TinyStage(Path(folder), world, training_config(engine="deepspeed", zero_stage=1), 4)
    engine = tiny.parts().engine
    seed_everything(3, world.rank)
    torch.rand(5 + world.rank)
    Checkpointer(Path(folder), world).save(engine, TrainState(step=1))
    wanted = torch.rand(3).tolist()
    seed_everything(99)
    Checkpointer(Path(folder), world).restore(engine)
    return wanted, torch.rand(3).tolist()


def test_each_rank_gets_its_own_random_state_back(tmp_path: Path) -> None:
    results = run_distributed(_draw, 2, str(tmp_path), timeout=300)
    for wanted, found in results:
        assert found == wanted
    assert results[0][0] != results[1][0]
