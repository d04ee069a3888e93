"""Muon, M3 and deep momentum under ZeRO 1 to 3 on two ranks against plain torch on one; and the exchange behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hsmn_dist.config.optim import OptimConfig
from hsmn_dist.distributed.collectives import all_reduce_sum
from hsmn_dist.distributed.determinism import seed_everything
from hsmn_dist.distributed.matrix_owner import MatrixExchange, choose_owners, matrix_cost
from hsmn_dist.distributed.shards import owned_range
from hsmn_dist.distributed.world import World
from hsmn_dist.training.build import build_engine
from hsmn_dist.training.engine import Engine
from tests.support.distributed import run_distributed
from tests.support.models import TinyModel, rows_of, tiny_batch
from tests.support.stages import training_config

RULES = {
    "muon": {"kind": "muon", "weight_decay": 0.1},
    "m3": {"kind": "m3", "slow_every_steps": 3, "weight_decay": 0.1},
    "deep_momentum": {"kind": "deep_momentum", "variant": "delta"},
}
CASES = [("muon", 1), ("muon", 2), ("muon", 3), ("m3", 1), ("m3", 3), ("deep_momentum", 2)]
SHAPES = [(13, 7), (7, 13), (5, 5), (1, 9), (20, 3)]


def test_owners_are_balanced_and_every_matrix_has_one() -> None:
    costs = [matrix_cost(shape) for shape in [(512, 2048)] * 10 + [(512, 512)] * 21]
    owners = choose_owners(costs, 4)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(4)]
    assert len(owners) == 31 and set(owners) == {0, 1, 2, 3}
    assert max(loads) < 1.3 * sum(loads) / 4
    assert choose_owners(costs, 1) == [0] * 31
    assert choose_owners([5.0, 5.0, 5.0], 2) == [0, 1, 0]


def make(world: World, rule: str, name: str, stage: int) -> Engine:
    seed_everything(5)
    optim = OptimConfig.model_validate({"optimizer": {"learning_rate": 0.01, **RULES[rule]}})
    training = training_config(engine=name, zero_stage=stage, max_gradient_norm=1.0)
    return build_engine(training, optim, lambda: TinyModel(num_blocks=3), world)


def steps(engine: Engine, world: World, first: int, last: int) -> list[float]:
    losses, each = [], 8 // world.world_size
    for step in range(first, last):
        batch = tiny_batch(step, 8)
        num_tokens = int(batch.loss_mask.sum())
        total = torch.zeros(())
        for start in range(world.rank * each, (world.rank + 1) * each, 2):
            total += engine.forward_backward(rows_of(batch, start, start + 2), num_tokens)
        engine.step(0.01)
        losses.append(float(all_reduce_sum(total)) / num_tokens)
    return losses


def _exchange_on_this_rank(world: World) -> dict[int, Tensor]:
    wholes = [torch.arange(rows * columns).view(rows, columns) + 1000.0 * i for i, (rows, columns) in enumerate(SHAPES)]
    # The third matrix is on rank 0 alone; the others are cut in two.
    ranges = [owned_range(whole.numel(), world.rank, world.world_size) for whole in wholes]
    ranges[2] = (0, 25) if world.rank == 0 else (25, 25)
    pieces = [whole.view(-1)[start:stop] for whole, (start, stop) in zip(wholes, ranges, strict=True)]
    exchange = MatrixExchange(SHAPES, ranges)
    owned = exchange.gather(pieces)
    for index, whole in owned.items():
        assert torch.equal(whole, wholes[index])
    back = exchange.scatter({index: whole + 0.5 for index, whole in owned.items()}, pieces[0])
    for piece, result in zip(pieces, back, strict=True):
        assert torch.equal(result, piece + 0.5)
    return owned


def _on_two_ranks(world: World, folder: str) -> dict[str, Any]:
    results: dict[str, Any] = {"owned": sorted(_exchange_on_this_rank(world))}
    for rule, stage in CASES:
        engine = make(world, rule, "deepspeed", stage)
        losses = steps(engine, world, 0, 5)
        saved = Path(folder) / f"{rule}{stage}"
        saved.mkdir(parents=True, exist_ok=True)
        torch.distributed.barrier()
        engine.save(saved)
        torch.distributed.barrier()
        losses += steps(engine, world, 5, 8)
        weights = engine.state_dict()
        engine.close()
        same = make(world, rule, "deepspeed", stage)
        same.load(saved)
        assert steps(same, world, 5, 8) == losses[5:]
        again = same.state_dict()
        assert all(torch.equal(again[name], weights[name]) for name in weights)
        same.close()
        results[f"{rule} {stage}"] = (losses, weights)
    return results


def test_matrix_rules_under_zero_train_as_on_one_rank_and_their_state_can_be_resharded(tmp_path: Path) -> None:
    first, second = run_distributed(_on_two_ranks, 2, str(tmp_path), timeout=300)
    assert sorted(first["owned"] + second["owned"]) == list(range(len(SHAPES)))
    assert first["owned"] and second["owned"]
    world = World()
    for rule, stage in CASES:
        losses, weights = first[f"{rule} {stage}"]
        engine = make(world, rule, "local", 0)
        wanted = steps(engine, world, 0, 8)
        assert max(abs(a - b) for a, b in zip(losses, wanted, strict=True)) < 1e-4, (rule, stage)
        for name, weight in engine.state_dict().items():
            assert (weights[name] - weight).abs().max() < 2e-3, (rule, stage, name)
        resharded = make(world, rule, "local", 0)
        resharded.load(tmp_path / f"{rule}{stage}")
        assert steps(resharded, world, 5, 8) == pytest.approx(losses[5:], abs=1e-4), (rule, stage)


def test_what_one_rank_saved_goes_on_under_zero(tmp_path: Path) -> None:
    world = World()
    local = make(world, "muon", "local", 0)
    steps(local, world, 0, 4)
    local.save(tmp_path)
    wanted = steps(local, world, 4, 6)
    engine = make(world, "muon", "deepspeed", 3)
    engine.load(tmp_path)
    assert steps(engine, world, 4, 6) == pytest.approx(wanted, abs=1e-5)
    engine.close()
