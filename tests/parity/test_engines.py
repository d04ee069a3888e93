"""DeepSpeed on every ZeRO stage against plain torch on one rank: losses, norms, weights, evaluation.

A quadratic pull (as EWC adds) and clipping are active in all of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hsmn_dist.config.optim import OptimConfig
from hsmn_dist.config.training import TrainingConfig
from hsmn_dist.distributed.collectives import all_reduce_sum
from hsmn_dist.distributed.determinism import seed_everything
from hsmn_dist.distributed.world import World
from hsmn_dist.foundation.param_role import ParamUpdate
from hsmn_dist.models.contract import cross_entropy
from hsmn_dist.training.build import build_engine
from hsmn_dist.training.engine import Engine
from tests.support.distributed import run_distributed
from tests.support.models import TinyModel, rows_of, tiny_batch

NUM_EXAMPLES = 8
RATE = 1e-2
OPTIM = OptimConfig.model_validate({"optimizer": {"learning_rate": RATE, "weight_decay": 0.1}})


@dataclass
class Course:
    """What a short training gives."""

    losses: list[float]
    norms: list[float]
    component_norms: list[dict[str, float]]
    num_clipped: int
    validation: float
    weights: dict[str, Tensor]


def make_engine(
    world: World, name: str, stage: int, precision: str = "fp32", tied: bool = True, offload: str = "none"
) -> Engine:
    training = TrainingConfig.model_validate(
        {
            "engine": name,
            "zero_stage": stage,
            "precision": precision,
            "global_batch_examples": NUM_EXAMPLES,
            "micro_batch_examples": 2,
            "max_gradient_norm": 1.0,
            "persistent_parameter_elements": 20,
            "offload": {"optimizer": offload, "parameters": offload if stage == 3 else "none"},
        }
    )
    seed_everything(3)
    return build_engine(training, OPTIM, lambda: TinyModel(tied=tied), world)


def run_step(
    engine: Engine, world: World, step: int, anchors: list[Tensor]
) -> tuple[float, float, dict[str, float], bool]:
    """One step on this rank's rows of global batch `step`; returns loss, norm, norms by component, clipped."""
    batch = tiny_batch(step, NUM_EXAMPLES)
    num_tokens = int(batch.loss_mask.sum())
    total = torch.zeros(())
    each = NUM_EXAMPLES // world.world_size
    for start in range(world.rank * each, (world.rank + 1) * each, 2):
        total += engine.forward_backward(rows_of(batch, start, start + 2), num_tokens)
    for shard, anchor in zip(engine.param_shards(), anchors, strict=True):
        assert shard.gradient is not None
        shard.gradient.add_((0.3 * (shard.value - anchor)).to(shard.gradient.dtype))
    stats = engine.step(RATE, total)
    assert not stats.was_skipped
    assert stats.nll == pytest.approx(float(all_reduce_sum(total)), rel=1e-6)
    return stats.nll / num_tokens, stats.gradient_norm, stats.component_norms, stats.was_clipped


def run_course(engine: Engine, world: World, num_steps: int) -> Course:
    anchors = [torch.zeros_like(shard.value) for shard in engine.param_shards()]
    course = Course([], [], [], 0, 0.0, {})
    for step in range(num_steps):
        loss, norm, by_component, was_clipped = run_step(engine, world, step, anchors)
        course.losses.append(loss)
        course.norms.append(norm)
        course.component_norms.append(by_component)
        course.num_clipped += was_clipped
    batch, each = tiny_batch(999, NUM_EXAMPLES), NUM_EXAMPLES // world.world_size
    nll, num_tokens = engine.evaluate(rows_of(batch, world.rank * each, (world.rank + 1) * each))
    course.validation = float(all_reduce_sum(nll.clone())) / float(all_reduce_sum(num_tokens.clone()))
    course.weights = engine.state_dict()
    return course


def local_course(num_steps: int, precision: str = "fp32", tied: bool = True) -> Course:
    world = World()
    return run_course(make_engine(world, "local", 0, precision, tied), world, num_steps)


def assert_same_course(found: Course, wanted: Course, tolerance: float, check_validation: bool = True) -> None:
    assert max(abs(a - b) for a, b in zip(found.losses, wanted.losses, strict=True)) < tolerance
    assert max(abs(a - b) for a, b in zip(found.norms, wanted.norms, strict=True)) < tolerance
    for ours, theirs in zip(found.component_norms, wanted.component_norms, strict=True):
        assert ours == pytest.approx(theirs, abs=tolerance)
    assert wanted.num_clipped > 0, "clipping must act"
    assert wanted.num_clipped < len(wanted.losses) or len(wanted.losses) < 50, "and not on every step"
    assert found.num_clipped == wanted.num_clipped
    assert list(found.weights) == list(wanted.weights)
    for name, weight in wanted.weights.items():
        assert (found.weights[name] - weight).abs().max() < tolerance, name
    if check_validation:
        assert abs(found.validation - wanted.validation) < tolerance


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_rank_of_deepspeed_trains_as_plain_torch_does(stage: int) -> None:
    world = World()
    found = run_course(make_engine(world, "deepspeed", stage), world, 50)
    assert_same_course(found, local_course(50), 1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_steps_may_have_different_numbers_of_micro_batches(stage: int) -> None:
    """As packed rows have, and numbers of ranks that do not divide the global batch."""
    ways = [(2, 2, 2, 2), (8,), (4, 2, 2), (1, 1, 1, 1, 4)]
    assert all(sum(way) == NUM_EXAMPLES for way in ways)
    found = []
    for name in ("deepspeed", "local"):
        engine = make_engine(World(), name, stage if name == "deepspeed" else 0)
        for step, way in enumerate(ways):
            batch, start = tiny_batch(step, NUM_EXAMPLES), 0
            engine.begin_step(len(way))
            for size in way:
                engine.forward_backward(rows_of(batch, start, start + size), int(batch.loss_mask.sum()))
                start += size
            engine.step(RATE)
        found.append(engine.state_dict())
    assert all((weight - found[1][name]).abs().max() < 1e-5 for name, weight in found[0].items())


@pytest.mark.parametrize("stage", ["local", 0, 1, 2, 3])
def test_a_parameter_may_have_a_rate_of_its_own(stage: int | str) -> None:
    """Adam's first step is as long as the rate, so it shows the rate."""
    training = TrainingConfig.model_validate(
        {
            "engine": "local" if stage == "local" else "deepspeed",
            "zero_stage": 0 if stage == "local" else stage,
            "global_batch_examples": 2,
            "micro_batch_examples": 2,
        }
    )
    optim = OptimConfig.model_validate({"optimizer": {"weight_decay": 0.0}})
    scales = {"head.weight": 0.0, "embedding.weight": 0.25}
    engine = build_engine(
        training, optim, lambda: TinyModel(tied=False), World(), {name: ParamUpdate(1, s) for name, s in scales.items()}
    )
    before = engine.state_dict()
    engine.forward_backward(tiny_batch(0, 2), 5)
    engine.step(RATE)
    for name, weight in engine.state_dict().items():
        longest = float((weight - before[name]).abs().max())
        assert longest == pytest.approx(RATE * scales.get(name, 1.0), rel=1e-3), name


def test_torchs_linear_is_torchs_again_when_the_last_engine_is_closed() -> None:
    plain = torch.nn.functional.linear
    first, second = (make_engine(World(), "deepspeed", stage) for stage in (3, 2))
    assert torch.nn.functional.linear is not plain
    first.close()
    third = make_engine(World(), "deepspeed", 3)
    second.close()
    assert torch.nn.functional.linear is not plain, "one is still open"
    third.close()
    assert torch.nn.functional.linear is plain
    run_course(make_engine(World(), "deepspeed", 3), World(), 1)
    assert torch.nn.functional.linear is not plain


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_follows_the_bf16_twin_closely(stage: int) -> None:
    world = World()
    found = run_course(make_engine(world, "deepspeed", stage, "bf16"), world, 20)
    wanted = local_course(20, "bf16")
    assert max(abs(a - b) for a, b in zip(found.losses, wanted.losses, strict=True)) < 0.01
    assert all(weight.dtype == torch.float32 for weight in found.weights.values())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_optimizers_see_penalty_and_clipping_and_resume_bit_for_bit(stage: int, tmp_path: Path) -> None:
    world = World()
    engine = make_engine(world, "deepspeed", stage, offload="cpu")
    assert_same_course(run_course(engine, world, 50), local_course(50), 1e-5)
    engine.save(tmp_path)
    anchors = [torch.zeros_like(shard.value) for shard in engine.param_shards()]
    wanted = [run_step(engine, world, 100 + step, anchors)[:2] for step in range(3)]
    other = make_engine(world, "deepspeed", stage, offload="cpu")
    other.load(tmp_path)
    assert [run_step(other, world, 100 + step, anchors)[:2] for step in range(3)] == wanted


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_frozen_parameters_stay_and_travel_with_the_state(stage: int, tmp_path: Path) -> None:
    def frozen_model() -> TinyModel:
        model = TinyModel()
        model.embedding.weight.requires_grad_(False)
        return model

    training = TrainingConfig.model_validate(
        {
            "zero_stage": stage,
            "global_batch_examples": 2,
            "micro_batch_examples": 2,
            "persistent_parameter_elements": 20,
        }
    )
    torch.manual_seed(1)
    engine = build_engine(training, OPTIM, frozen_model, World())
    before = engine.state_dict()
    for step in range(3):
        engine.forward_backward(tiny_batch(step, 2), 5)
        engine.step(RATE)
    after = engine.state_dict()
    assert list(after) == list(before)
    assert torch.equal(after["embedding.weight"], before["embedding.weight"])
    assert not torch.equal(after["head.weight"], before["head.weight"])
    assert "embedding.weight" not in [shard.name for shard in engine.param_shards()]
    engine.save(tmp_path)
    other = build_engine(training, OPTIM, frozen_model, World())
    assert not torch.equal(other.state_dict()["embedding.weight"], before["embedding.weight"])
    other.load(tmp_path)
    assert all(torch.equal(value, after[name]) for name, value in other.state_dict().items())
    assert float(other.evaluate(tiny_batch(5))[0]) == float(engine.evaluate(tiny_batch(5))[0])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_parameter_that_no_batch_used_gets_no_gradient_of_an_earlier_step(stage: int) -> None:
    """ZeRO-3 keeps such gradients; here the head's bias is used in the first step alone."""
    engine = make_engine(World(), "deepspeed", stage, tied=False)
    for step in range(2):
        for start in range(0, NUM_EXAMPLES, 2):
            engine.forward_backward(rows_of(tiny_batch(step, NUM_EXAMPLES), start, start + 2), 10)
        shard = next(shard for shard in engine.param_shards() if shard.name == "head.bias")
        if step == 0:
            assert float(shard.gradient.abs().max()) > 0
            engine.step(RATE)
            engine.module.head.forward = lambda x: nn.functional.linear(x, engine.module.head.weight)
        else:
            assert shard.gradient is None or float(shard.gradient.abs().max()) == 0


@pytest.mark.parametrize("reason", ["not finite", "refused"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_or_a_refused_step_changes_nothing(stage: int, reason: str) -> None:
    world = World()
    engine = make_engine(world, "deepspeed", stage)
    anchors = [torch.zeros_like(shard.value) for shard in engine.param_shards()]
    run_step(engine, world, 0, anchors)
    before = engine.state_dict()
    for start in range(0, NUM_EXAMPLES, 2):
        engine.forward_backward(rows_of(tiny_batch(1, NUM_EXAMPLES), start, start + 2), 10)
    asked: list[tuple[float, float]] = []

    def accepts(nll: float, gradient_norm: float) -> bool:
        asked.append((nll, gradient_norm))
        return reason != "refused"

    if reason == "not finite":
        engine.param_shards()[0].gradient.fill_(float("nan"))
    stats = engine.step(RATE, torch.tensor(7.0), accepts)
    assert stats.was_skipped and math.isnan(stats.gradient_norm) == (reason == "not finite")
    assert [nll for nll, _ in asked] == [7.0] and str(asked[0][1]) == str(stats.gradient_norm)
    assert all(torch.equal(value, before[name]) for name, value in engine.state_dict().items())
    loss, *_ = run_step(engine, world, 2, anchors)
    local = make_engine(World(), "local", 0)
    run_step(local, world, 0, anchors)
    assert run_step(local, world, 2, anchors)[0] == pytest.approx(loss, abs=1e-5), "the skipped step left no trace"


def _on_two_ranks(world: World, folder: str) -> dict[str, object]:
    results: dict[str, object] = {}
    for stage, precision, tied, num_steps in [
        (0, "fp32", False, 10),
        (1, "fp32", True, 50),
        (2, "fp32", True, 50),
        (3, "fp32", True, 50),
        (3, "fp32", False, 10),
        (1, "bf16", True, 10),
        (2, "bf16", True, 10),
        (3, "bf16", True, 10),
    ]:
        engine = make_engine(world, "deepspeed", stage, precision, tied)
        results[f"{stage} {precision} {tied}"] = run_course(engine, world, num_steps)
        shards = engine.param_shards(with_gradients=False)
        results[f"sizes {stage} {precision} {tied}"] = sum(shard.num_elements for shard in shards)
        _check_edits(engine, world)
        _check_state(engine, world, stage, precision, tied, Path(folder) / f"{stage}_{precision}_{tied}")
        engine.close()
    return results


def _check_edits(engine: Engine, world: World) -> None:
    """Edited shards and loaded weights are what forward and state_dict read."""
    reference = TinyModel(tied=engine.module.head is None)
    weights = {}
    for name, value in engine.state_dict().items():
        weights[name] = torch.arange(value.numel()).view(value.shape) % 7 / 10 - 0.3
    engine.load_weights(weights)
    gathered = engine.state_dict()
    for name, value in weights.items():
        assert torch.equal(gathered[name], value), name
    for shard in engine.param_shards(with_gradients=False):
        shard.value.mul_(0.5)
    engine.refresh()
    reference.load_state_dict({name: value * 0.5 for name, value in weights.items()})
    batch = tiny_batch(7, 4)
    with torch.no_grad():
        expected = reference(batch, target_loss=cross_entropy).nll.sum()
    found, _ = engine.evaluate(batch)
    is_fp32 = next(engine.module.parameters()).dtype == torch.float32
    assert abs(float(found) - float(expected)) < (1e-4 if is_fp32 else 1.0)


def _check_state(engine: Engine, world: World, stage: int, precision: str, tied: bool, folder: Path) -> None:
    """Saved, trained on, loaded into another engine, trained on: bit for bit the same."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    engine.save(folder)
    torch.distributed.barrier()
    anchors = [torch.zeros_like(shard.value) for shard in engine.param_shards()]
    wanted = [run_step(engine, world, 100 + step, anchors)[:2] for step in range(3)]
    weights = engine.state_dict()
    other = make_engine(world, "deepspeed", stage, precision, tied)
    other.load(folder)
    found = [run_step(other, world, 100 + step, anchors)[:2] for step in range(3)]
    assert found == wanted
    again = other.state_dict()
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    other.close()


def test_two_ranks_of_deepspeed_train_as_plain_torch_does_and_resume_bit_for_bit(tmp_path: Path) -> None:
    first, second = run_distributed(_on_two_ranks, 2, str(tmp_path), timeout=400)
    num_weights = {tied: sum(p.numel() for p in TinyModel(tied=tied).parameters()) for tied in (True, False)}
    for key, course in first.items():
        stage, precision, tied = key.split()[-3:]
        if key.startswith("sizes"):
            copies = 2 if stage == "0" else 1
            assert course + second[key] == copies * num_weights[tied == "True"], key
            continue
        assert course.losses == second[key].losses
        if precision == "fp32":
            assert_same_course(course, local_course(len(course.losses), tied=tied == "True"), 1e-5)
        else:
            wanted = local_course(len(course.losses), "bf16", tied == "True")
            assert max(abs(a - b) for a, b in zip(course.losses, wanted.losses, strict=True)) < 0.01
