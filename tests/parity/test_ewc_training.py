"""Training with EWC on engines against plain torch: autograd on loss + explicit list of penalties."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hsmn_dist.config.optim import OptimConfig
from hsmn_dist.config.training import TrainingConfig
from hsmn_dist.continual.ewc import EwcMemory, EwcPenalty, TaskRecord
from hsmn_dist.continual.store import load_store, save_store
from hsmn_dist.distributed.collectives import all_reduce_sum
from hsmn_dist.distributed.determinism import seed_everything
from hsmn_dist.distributed.world import World
from hsmn_dist.models.contract import cross_entropy
from hsmn_dist.optim.build import build_optimizer
from hsmn_dist.training.build import build_engine
from hsmn_dist.training.engine import Engine
from tests.support.distributed import run_distributed
from tests.support.models import TinyModel, rows_of, tiny_batch

NUM_EXAMPLES, NUM_STEPS, STRENGTH = 8, 50, 3.0
MAX_NORM = {"coupled": 1.0, "proximal": 0.3}  # so that many steps are clipped: the penalty is not in the latter's norm
RATE = 1e-2
OPTIM = OptimConfig.model_validate({"optimizer": {"learning_rate": RATE, "weight_decay": 0.1}})
FACTORS = {"encoder": 0.5}


def model() -> TinyModel:
    seed_everything(3)
    return TinyModel(tied=True)


def tasks() -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """(anchor, Fisher) of three earlier tasks, whole, by name."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(3):
        anchor = {
            n: p.detach() + 0.3 * torch.randn(p.shape, generator=generator) for n, p in model().named_parameters()
        }
        fisher = {n: torch.randn(a.shape, generator=generator).square() for n, a in anchor.items()}
        made.append((anchor, fisher))
    return made


def reference(application: str = "coupled") -> tuple[list[float], list[float], int]:
    """Losses, penalties and clipped steps of plain torch, with the explicit list of penalties."""
    net = model()
    named = dict(net.named_parameters())
    optimizer = build_optimizer(OPTIM, named.items(), net.parameter_roles(), {})
    components, earlier = net.parameter_components(), tasks()
    losses, penalties, num_clipped, largest = [], [], 0, MAX_NORM[application]
    for step in range(NUM_STEPS):
        batch = tiny_batch(step, NUM_EXAMPLES)
        loss = net(batch, target_loss=cross_entropy).nll.sum() / batch.loss_mask.sum()
        penalty = torch.zeros(())
        for anchor, fisher in earlier:
            for name, weight in named.items():
                factor = STRENGTH * FACTORS.get(components[name], 1.0)
                penalty = penalty + factor / 2 * (fisher[name] * (weight - anchor[name]) ** 2).sum()
        optimizer.zero_grad()
        (loss + penalty if application == "coupled" else loss).backward()
        num_clipped += float(torch.nn.utils.clip_grad_norm_(net.parameters(), largest)) > largest
        for group in optimizer.param_groups:
            group["lr"] = RATE
        optimizer.step()
        if application == "proximal":
            pull_towards_anchors(named, components, earlier)
        losses.append(loss.item())
        penalties.append(penalty.item())
    return losses, penalties, num_clipped


@torch.no_grad()
def pull_towards_anchors(named, components, earlier) -> None:
    """The minimiser of the sum of penalties + |theta - theta'|^2 / (2 rate), parameter by parameter."""
    for name, weight in named.items():
        factor = RATE * STRENGTH * FACTORS.get(components[name], 1.0)
        total = sum(fisher[name] for _, fisher in earlier)
        pulled = sum(fisher[name] * anchor[name] for anchor, fisher in earlier)
        weight.copy_((weight + factor * pulled) / (1 + factor * total))


def engine_at(
    world: World,
    name: str,
    stage: int,
    precision: str = "fp32",
    offload: str = "none",
    application: str = "coupled",
) -> Engine:
    training = TrainingConfig.model_validate(
        {
            "engine": name,
            "zero_stage": stage,
            "precision": precision,
            "global_batch_examples": NUM_EXAMPLES,
            "micro_batch_examples": 1,
            "max_gradient_norm": MAX_NORM[application],
            "persistent_parameter_elements": 20,
            "offload": {"optimizer": offload},
        }
    )
    return build_engine(training, OPTIM, model, world)


def memory_for(engine: Engine) -> EwcMemory:
    shards = engine.param_shards(with_gradients=False)
    memory = EwcMemory.empty(shards)
    start = [shard.value.clone() for shard in shards]
    for anchor, fisher in tasks():
        for shard in shards:
            shard.value.copy_(anchor[shard.name].reshape(-1)[shard.start : shard.stop])
        parts = [fisher[shard.name].reshape(-1)[shard.start : shard.stop] for shard in shards]
        memory.add_task(shards, parts, TaskRecord("earlier"))
    for shard, value in zip(shards, start, strict=True):
        shard.value.copy_(value)
    return memory


def course(engine: Engine, world: World, penalty: EwcPenalty, num_steps: int = NUM_STEPS):
    """Losses, penalties and clipped steps."""
    losses, penalties, num_clipped = [], [], 0
    each = NUM_EXAMPLES // world.world_size
    for step in range(num_steps):
        batch = tiny_batch(step, NUM_EXAMPLES)
        num_tokens = int(batch.loss_mask.sum())
        total = torch.zeros(())
        for row in range(world.rank * each, (world.rank + 1) * each):
            total += engine.forward_backward(rows_of(batch, row, row + 1), num_tokens)
        shards = engine.param_shards()
        penalties.append(float(all_reduce_sum(penalty.local_value(shards))))
        penalty.add_gradients(shards)
        stats = engine.step(RATE)
        if penalty.after_step(engine.param_shards(with_gradients=False), RATE):
            engine.refresh()
        losses.append(float(all_reduce_sum(total)) / num_tokens)
        num_clipped += stats.was_clipped
    return losses, penalties, num_clipped


def assert_follows(found, tolerance: float, application: str = "coupled") -> None:
    losses, penalties, num_clipped = reference(application)
    assert max(abs(a - b) for a, b in zip(found[0], losses, strict=True)) < tolerance
    assert found[1] == pytest.approx(penalties, rel=max(1e-4, tolerance))
    assert num_clipped >= 10, "the comparison must see clipping"
    assert abs(found[2] - num_clipped) <= (0 if tolerance < 1e-3 else 3)


def on_ranks(world: World, stages: list[int], precision: str, folder: str, application: str = "coupled"):
    """A course for each stage; the memory goes through a store written at another stage."""
    torch.set_num_threads(1)
    results = []
    for stage in stages:
        engine = engine_at(world, "deepspeed", stage, precision, application=application)
        memory = memory_for(engine)
        copies = engine.num_shard_copies
        assert copies == (world.world_size if stage == 0 else 1)
        save_store(Path(folder) / str(stage), memory, world, copies)
        source = Path(folder) / str(stages[max(0, stages.index(stage) - 1)])
        loaded = load_store(source, engine.param_shards(False))
        assert loaded.num_bytes <= 8 * sum(s.num_elements for s in engine.param_shards(False))
        penalty = EwcPenalty(loaded, STRENGTH, application, FACTORS, copies)
        results.append(course(engine, world, penalty))
        engine.close()
    return results


@pytest.mark.parametrize("application", ["coupled", "proximal"])
def test_local_engine_with_ewc_follows_plain_torch_with_the_list_of_penalties(application: str) -> None:
    engine = engine_at(World(), "local", 0, application=application)
    penalty = EwcPenalty(memory_for(engine), STRENGTH, application, FACTORS)
    assert_follows(course(engine, World(), penalty), 1e-5, application)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("application", ["coupled", "proximal"])
def test_an_offloaded_optimizer_follows_it_with_its_buffers_beside_its_shards(stage: int, application: str) -> None:
    engine = engine_at(World(), "deepspeed", stage, offload="cpu", application=application)
    memory = memory_for(engine)
    for kept, shard in zip(memory.shards, engine.param_shards(False), strict=True):
        assert kept.precision.device == kept.centre.device == shard.value.device
    found = course(engine, World(), EwcPenalty(memory, STRENGTH, application, FACTORS))
    assert_follows(found, 1e-5, application)
    engine.close()


def test_two_ranks_on_every_zero_stage_follow_it_too(tmp_path: Path) -> None:
    for results in run_distributed(on_ranks, 2, [0, 1, 2, 3], "fp32", str(tmp_path), timeout=400):
        for found in results:
            assert_follows(found, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 4])
def test_one_and_four_ranks_on_every_zero_stage_follow_it_too(world_size: int, tmp_path: Path) -> None:
    for results in run_distributed(on_ranks, world_size, [0, 1, 2, 3], "fp32", str(tmp_path), timeout=500):
        for found in results:
            assert_follows(found, 1e-5)


@pytest.mark.slow
def test_two_ranks_on_every_zero_stage_follow_the_proximal_step_too(tmp_path: Path) -> None:
    for results in run_distributed(on_ranks, 2, [0, 1, 2, 3], "fp32", str(tmp_path), "proximal", timeout=500):
        for found in results:
            assert_follows(found, 1e-5, "proximal")


@pytest.mark.slow
def test_two_ranks_in_bf16_follow_it_roughly(tmp_path: Path) -> None:
    for results in run_distributed(on_ranks, 2, [1, 2, 3], "bf16", str(tmp_path), timeout=400):
        for found in results:
            assert_follows(found, 0.05)


@pytest.mark.parametrize("strength", [1.0, 1e3, 1e6, 1e9])
def test_proximal_stays_finite_where_coupled_diverges(strength: float) -> None:
    finite = {}
    for application in ("coupled", "proximal"):
        training = TrainingConfig.model_validate(
            {"engine": "local", "global_batch_examples": 4, "micro_batch_examples": 4, "max_gradient_norm": 0.0}
        )
        engine = build_engine(training, OPTIM, model, World())
        memory = memory_for(engine)
        penalty = EwcPenalty(memory, strength, application)
        batch = tiny_batch(0, 4)
        for _ in range(40):  # plain descent of rate 0.1 on the shards, which is where coupled leaves its region
            engine.forward_backward(batch, float(batch.loss_mask.sum()))
            shards = engine.param_shards()
            penalty.add_gradients(shards)
            for shard in shards:
                shard.value.sub_(0.1 * shard.gradient)
            engine.discard_gradients()
            penalty.after_step(engine.param_shards(False), 0.1)
        finite[application] = all(bool(torch.isfinite(s.value).all()) for s in engine.param_shards(False))
    assert finite["proximal"]
    assert finite["coupled"] is (strength == 1.0)


def test_strength_zero_trains_bit_for_bit_as_without_ewc() -> None:
    weights = []
    for application in (None, "coupled", "proximal"):
        engine = engine_at(World(), "local", 0)
        memory = memory_for(engine)
        empty = EwcPenalty(EwcMemory.empty(engine.param_shards(False)), 1.0)
        penalty = empty if application is None else EwcPenalty(memory, 0.0, application)
        course(engine, World(), penalty, 5)
        weights.append(engine.state_dict())
    for name, weight in weights[0].items():
        for other in weights[1:]:
            assert torch.equal(weight.view(torch.int32), other[name].view(torch.int32))
