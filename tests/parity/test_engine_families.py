"""HSMN and HOPE under ZeRO 3 and 2 on two ranks against plain torch, with blocks recomputed and ranks that see different lengths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hsmn_dist.config.models import HopeConfig, HsmnConfig
from hsmn_dist.config.optim import OptimConfig
from hsmn_dist.config.training import TrainingConfig
from hsmn_dist.distributed.collectives import all_reduce_sum
from hsmn_dist.distributed.determinism import seed_everything
from hsmn_dist.distributed.world import World
from hsmn_dist.models.build import build_model
from hsmn_dist.models.contract import ModelInput
from hsmn_dist.training.build import build_engine
from tests.support.distributed import run_distributed

HSMN = HsmnConfig(
    vocab_size=40,
    d_model=12,
    num_heads=2,
    d_feed_forward=20,
    num_encoder_layers=1,
    num_decoder_layers=2,
    chunk_size=6,
    chunk_stride=3,
    d_compressed=5,
    d_aggregator=7,
    aggregator_rank=3,
    window_size=4,
    max_target_tokens=32,
    encoder_dropout=0.0,
    decoder_dropout=0.0,
)
HOPE = HopeConfig(vocab_size=40, d_model=12, num_layers=2, num_heads=2, d_feed_forward=20, num_memory_modules=2)
FAMILIES = {"hsmn": HSMN, "hsmn in groups": HSMN.model_copy(update={"encoder_group_chunks": 2}), "hope": HOPE}
CASES = [("hsmn", 2), ("hsmn", 3), ("hsmn in groups", 3), ("hope", 3)]
NUM_STEPS = 3


def example(number: int) -> ModelInput:
    """One row of its own length: contexts of 3 to 50 tokens, targets of 2 to 9."""
    generator = torch.Generator().manual_seed(number)
    num_context = int(torch.randint(3, 51, (), generator=generator))
    num_target = int(torch.randint(2, 10, (), generator=generator))
    context = torch.randint(4, 40, (1, num_context), generator=generator)
    target = torch.randint(4, 40, (1, num_target), generator=generator)
    return ModelInput(
        context, torch.ones_like(context, dtype=torch.bool), target, torch.ones_like(target, dtype=torch.bool)
    )


def course(world: World, family: str, engine_name: str, zero_stage: int) -> tuple[list[float], dict[str, Tensor], int]:
    training = TrainingConfig.model_validate(
        {
            "engine": engine_name,
            "zero_stage": zero_stage,
            "global_batch_examples": 4,
            "micro_batch_examples": 1,
            "persistent_parameter_elements": 30,
            "activation_checkpointing": "every_block" if engine_name == "deepspeed" else "none",
        }
    )
    seed_everything(1)
    optim = OptimConfig.model_validate({"optimizer": {"learning_rate": 1e-3}})
    engine = build_engine(training, optim, lambda: build_model(FAMILIES[family]), world)
    losses, each = [], 4 // world.world_size
    for step in range(NUM_STEPS):
        rows = [example(10 * step + row) for row in range(4)]
        num_tokens = sum(int(row.loss_mask.sum()) for row in rows)
        total = torch.zeros(())
        for row in rows[world.rank * each : (world.rank + 1) * each]:
            total += engine.forward_backward(row, num_tokens)
        stats = engine.step(1e-3)
        losses.append(float(all_reduce_sum(total)) / num_tokens)
        losses.append(stats.gradient_norm)
    nll, _ = engine.evaluate(example(999))
    losses.append(float(nll))
    weights = engine.state_dict()
    engine.close()
    return losses, weights, sum(p.numel() for p in weights.values())


def _on_two_ranks(world: World) -> dict[tuple[str, int], Any]:
    return {(family, stage): course(world, family, "deepspeed", stage) for family, stage in CASES}


def test_both_families_train_under_zero_as_plain_torch_does() -> None:
    results = run_distributed(_on_two_ranks, 2, timeout=300)
    for (family, stage), (losses, weights, num_weights) in results[0].items():
        wanted, wanted_weights, wanted_count = course(World(), family, "local", 0)
        assert num_weights == wanted_count
        assert max(abs(a - b) for a, b in zip(losses, wanted, strict=True)) < 2e-5, (family, stage)
        for name, weight in wanted_weights.items():
            assert (weights[name] - weight).abs().max() < 2e-4, (family, stage, name)
        assert losses == results[1][family, stage][0]
