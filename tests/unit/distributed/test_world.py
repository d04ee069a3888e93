from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from hsmn_dist.distributed import collectives, determinism
from hsmn_dist.distributed.world import World
from hsmn_dist.foundation.errors import ConfigError
from tests.support.distributed import RankFailed, run_distributed


def test_one_rank_when_the_environment_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    # An engine of an earlier test in this process may have left its group of one rank, which DeepSpeed goes on using.
    had_group = dist.is_initialized()
    world = World.from_environment(device="cpu")
    assert (world.rank, world.local_rank, world.world_size, world.is_first) == (0, 0, 1, True)
    assert dist.is_initialized() == had_group, "one rank alone forms no group"


@pytest.mark.parametrize(("rank", "world_size"), [("2", "2"), ("x", "2"), ("-1", "1")])
def test_places_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch, rank: str, world_size: str) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(ConfigError, match="RANK"):
        World.from_environment(device="cpu")


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="CUDA"):
        World.from_environment(device="gpu")


def test_collectives_do_nothing_on_one_rank() -> None:
    assert collectives.all_reduce_sum(torch.tensor(3.0)).item() == 3.0
    assert collectives.broadcast_object({"a": 1}) == {"a": 1}
    assert collectives.all_gather_objects("x") == ["x"]
    assert collectives.any_rank(True) and not collectives.any_rank(False)
    collectives.barrier()


def _talk(world: World) -> dict[str, object]:
    piece = torch.zeros(5)
    piece[world.rank :: 2] = torch.tensor([-0.0, 1e-45, 3.5])[: len(piece[world.rank :: 2])]
    World.from_environment(device="cpu")  # joining twice adopts the group
    return {
        "sum": collectives.all_reduce_sum(torch.tensor(float(world.rank + 1))).item(),
        "max": collectives.all_reduce_max(torch.tensor(world.rank)).item(),
        "object": collectives.broadcast_object(f"from {world.rank}", source=1),
        "all": collectives.all_gather_objects(world.rank),
        "any": collectives.any_rank(world.rank == 1),
        "none": collectives.any_rank(False),
        "carries": collectives._carries_cpu_tensors(str(dist.get_backend_config())),
        "joined": collectives.sum_of_pieces(piece).view(torch.int32).tolist(),
    }


def test_two_ranks_agree_on_every_collective() -> None:
    first, second = run_distributed(_talk, 2)
    bits = torch.tensor([-0.0, -0.0, 1e-45, 1e-45, 3.5]).view(torch.int32).tolist()
    expected = {"sum": 3.0, "max": 1, "object": "from 1", "all": [0, 1], "any": True, "none": False, "joined": bits}
    expected["carries"] = True
    assert first == second == expected


@pytest.mark.parametrize(
    ("backend", "carries"),
    [("cpu:gloo,cuda:nccl", True), ("cpu:gloo,cuda:gloo", True), ("nccl", False), ("cuda:nccl", False)],
)
def test_host_tensors_go_by_the_device_where_the_group_is_for_gpus_alone(backend: str, carries: bool) -> None:
    assert collectives._carries_cpu_tensors(backend) is carries


def _fail_on_rank_one(world: World) -> None:
    if world.rank == 1:
        raise ValueError("the second rank is unwell")
    collectives.barrier()


def test_an_exception_on_one_rank_comes_back_and_nobody_waits() -> None:
    with pytest.raises(RankFailed, match="the second rank is unwell"):
        run_distributed(_fail_on_rank_one, 2)


def test_random_state_survives_json() -> None:
    import json
    import random

    import numpy as np

    determinism.seed_everything(5, rank=1)
    random.gauss(0, 1)
    np.random.standard_normal()
    state = json.loads(json.dumps(determinism.capture_rng()))
    drawn = (random.random(), random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.rand(3).tolist())
    determinism.restore_rng(state)
    again = (random.random(), random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.rand(3).tolist())
    assert drawn == again


def test_ranks_draw_different_numbers_and_rank_zero_draws_the_seed() -> None:
    draws = []
    for rank in (0, 1, 2, 0):
        determinism.seed_everything(7, rank)
        draws.append(torch.rand(4).tolist())
    assert draws[0] == draws[3]
    assert len({tuple(draw) for draw in draws}) == 3
