from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from hsmn_dist.config.optim import OptimConfig
from hsmn_dist.config.training import TrainingConfig
from hsmn_dist.distributed.shards import ParamShard
from hsmn_dist.distributed.world import World
from hsmn_dist.foundation.errors import ConfigError
from hsmn_dist.foundation.param_role import ParamRole
from hsmn_dist.models.contract import cross_entropy
from hsmn_dist.training.activation_checkpointing import checkpoint_blocks
from hsmn_dist.training.build import build_engine
from hsmn_dist.training.engine import Engine
from hsmn_dist.training.gradient_norms import gradient_norms
from tests.support.models import TinyModel, rows_of, tiny_batch

OPTIM = OptimConfig.model_validate({"optimizer": {"learning_rate": 0.01, "weight_decay": 0.1}})


def make(seed: int = 0, model: TinyModel | None = None, **changes: Any) -> Engine:
    training = TrainingConfig.model_validate({"engine": "local", **changes})
    torch.manual_seed(seed)
    return build_engine(training, OPTIM, lambda: model or TinyModel(), World())


def test_a_step_is_adamw_on_the_clipped_mean_loss() -> None:
    engine = make(max_gradient_norm=0.7)
    torch.manual_seed(0)
    model = TinyModel()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    for step in range(5):
        batch = tiny_batch(step, 6)
        num_tokens = int(batch.loss_mask.sum())
        for start in (0, 3):
            engine.forward_backward(rows_of(batch, start, start + 3), num_tokens)
        stats = engine.step(0.01)
        optimizer.zero_grad()
        (model(batch, target_loss=cross_entropy).nll.sum() / num_tokens).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.7)
        optimizer.step()
        assert stats.gradient_norm == pytest.approx(float(norm), rel=1e-5)
        assert stats.was_clipped == (float(norm) > 0.7)
    for name, weight in model.state_dict().items():
        assert (engine.state_dict()[name] - weight).abs().max() < 1e-6


def test_shards_are_views_and_gradients_exist_only_before_the_step() -> None:
    engine = make()
    assert all(shard.gradient is None for shard in engine.param_shards())
    engine.forward_backward(tiny_batch(0), 10)
    shards = engine.param_shards()
    assert [shard.name for shard in shards] == [name for name, _ in engine.module.named_parameters()]
    assert shards[0].name == "context_gain"
    shards[0].gradient.fill_(0.5)
    assert float(engine.module.context_gain.grad.mean()) == 0.5
    assert all(shard.gradient is None for shard in engine.param_shards(with_gradients=False))
    engine.discard_gradients()
    assert all(shard.gradient is None for shard in engine.param_shards())
    shards[0].value.zero_()
    engine.refresh()
    assert float(engine.module.context_gain.detach().abs().sum()) == 0.0


def test_bf16_keeps_fp32_masters_that_small_steps_do_not_get_lost_in() -> None:
    engine = make(precision="bf16", max_gradient_norm=0)
    before = engine.state_dict()
    for step in range(3):
        engine.forward_backward(tiny_batch(step), 10)
        engine.step(1e-6)
    assert next(engine.module.parameters()).dtype == torch.bfloat16
    moved = [(engine.state_dict()[name] - before[name]).abs().max() for name in before]
    assert all(0 < float(distance) < 1e-4 for distance in moved)


def test_a_refused_step_leaves_weights_and_moments_and_reports_its_numbers() -> None:
    engine, twin = make(), make()
    for refuses in (False, True, False):
        nll = engine.forward_backward(tiny_batch(int(refuses)), 10)
        stats = engine.step(0.01, nll, lambda *_, refuses=refuses: not refuses)
        assert stats.was_skipped == refuses
        assert stats.nll == float(nll) and stats.gradient_norm > 0
    for _ in range(2):
        twin.forward_backward(tiny_batch(0), 10)
        twin.step(0.01)
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in engine.state_dict().items())


def test_frozen_parameters_stay_and_are_part_of_the_weights() -> None:
    model = TinyModel()
    model.embedding.weight.requires_grad_(False)
    engine = make(model=model)
    before = engine.state_dict()
    engine.forward_backward(tiny_batch(0), 10)
    assert "embedding.weight" not in [shard.name for shard in engine.param_shards()]
    engine.step(0.1)
    after = engine.state_dict()
    assert list(after) == list(before)
    assert torch.equal(after["embedding.weight"], before["embedding.weight"])
    assert not torch.equal(after["head.weight"], before["head.weight"])


def test_a_batch_without_scored_tokens_gives_no_gradient_and_no_nan() -> None:
    engine = make()
    batch = tiny_batch(0)
    batch.loss_mask[:] = False
    assert float(engine.forward_backward(batch, 1)) == 0.0
    assert engine.step(0.01).gradient_norm == 0.0
    assert float(engine.evaluate(batch)[1]) == 0


def test_more_than_one_rank_is_refused() -> None:
    with pytest.raises(ConfigError, match="2 ranks"):
        build_engine(TrainingConfig(engine="local"), OPTIM, TinyModel, World(0, 0, 2))


@pytest.mark.parametrize(("policy", "expected"), [("none", 0), ("every_block", 3), ("every_second_block", 2)])
def test_recomputed_blocks_give_the_same_gradients(policy: str, expected: int) -> None:
    models = []
    for chosen in ("none", policy):
        torch.manual_seed(0)
        model = TinyModel(num_blocks=3, dropout=0.3)
        count = checkpoint_blocks(model, chosen)
        torch.manual_seed(1)
        model(tiny_batch(0), target_loss=cross_entropy).nll.sum().backward()
        models.append(model)
    assert count == expected
    for (name, plain), recomputed in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(plain.grad, recomputed.grad), name


def test_recomputing_calls_each_chosen_block_twice_in_training_and_once_in_evaluation() -> None:
    model, calls = TinyModel(num_blocks=2), []
    model.layers[0].wide.register_forward_hook(lambda *_: calls.append(1))
    checkpoint_blocks(model, "every_second_block")
    model(tiny_batch(0), target_loss=cross_entropy).nll.sum().backward()
    assert len(calls) == 2
    with torch.no_grad():
        model(tiny_batch(0), target_loss=cross_entropy)
    assert len(calls) == 3


def shard_of(component: str, gradient: list[float] | None) -> ParamShard:
    values = torch.zeros(len(gradient or []))
    tensor = None if gradient is None else torch.tensor(gradient)
    return ParamShard("p", ParamRole.VECTOR, component, tuple(values.shape), 0, values.numel(), values, tensor)


def test_norms_add_up_over_components_and_clip_as_torch_does() -> None:
    shards = [shard_of("a", [3.0]), shard_of("b", [0.0, 4.0]), shard_of("a", []), shard_of("b", None)]
    norms = gradient_norms(shards, ["a", "b", "c"], 1)
    assert norms.by_component == {"a": 3.0, "b": 4.0, "c": 0.0}
    assert norms.total == 5.0
    assert norms.clip_factor(1.0) == pytest.approx(0.2, rel=1e-5)
    assert norms.clip_factor(5.1) == 1.0 and norms.clip_factor(0.0) == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_says_so_and_clips_nothing(bad: float) -> None:
    norms = gradient_norms([shard_of("a", [bad]), shard_of("b", [1.0])], ["a", "b"], 1)
    assert not norms.is_finite and norms.clip_factor(1.0) == 1.0
    assert norms.by_component["b"] == 1.0
