"""HOPE on two ranks equals HOPE on one: outer gradients through per-sequence fast weights, and the clocks of every level.

Three kinds of memory under ZeRO-2 against plain torch in one process: in-context chains, self-modifying memories, and levels
that are parameters with update periods. Every rank sees other sequences of other lengths (hope.md, invariant 19).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hsmn_dist.config.optim import OptimConfig
from hsmn_dist.config.training import TrainingConfig
from hsmn_dist.distributed.collectives import all_reduce_sum
from hsmn_dist.distributed.determinism import seed_everything
from hsmn_dist.distributed.world import World
from hsmn_dist.models.build import build_model
from hsmn_dist.models.contract import ModelInput
from hsmn_dist.training.build import build_engine
from tests.support.distributed import run_distributed
from tests.support.hope_models import chain, small_memories, tiny_config

VARIANTS = {
    "chain in tokens": tiny_config(num_layers=1, mixer="linear", cms=chain((3, 6))),
    "self-modifying": tiny_config(num_layers=1, mixer="self_modifying", self_modifying=small_memories()),
    "chain in optimizer steps": tiny_config(num_layers=1, cms=chain((2, 4), cadence="optimizer")),
}
NUM_ROWS, NUM_STEPS = 4, 5
RATE = 1e-2


def sequence(number: int) -> ModelInput:
    """One row: no context, 5 to 19 scored tokens."""
    generator = torch.Generator().manual_seed(number)
    length = int(torch.randint(5, 20, (), generator=generator))
    target = torch.randint(4, 29, (1, length), generator=generator)
    nothing = torch.zeros(1, 0, dtype=torch.long)
    return ModelInput(nothing, nothing.bool(), target, torch.ones_like(target).bool())


def course(world: World, variant: str, engine_name: str) -> dict[str, Any]:
    """Losses, gradient norms, ticks of this rank's rows, and which parameters each step changed; then the weights."""
    training = TrainingConfig.model_validate(
        {"engine": engine_name, "zero_stage": 2, "global_batch_examples": NUM_ROWS, "micro_batch_examples": 1}
    )
    seed_everything(3)
    optim = OptimConfig.model_validate({"optimizer": {"learning_rate": RATE}})
    engine = build_engine(training, optim, lambda: build_model(VARIANTS[variant]), world)
    each = NUM_ROWS // world.world_size
    numbers, ticks, changed = [], [], []
    before = engine.state_dict()
    for step in range(NUM_STEPS):
        rows = [sequence(10 * step + row) for row in range(NUM_ROWS)]
        num_tokens = sum(int(row.loss_mask.sum()) for row in rows)
        total = torch.zeros(())
        for row in rows[world.rank * each : (world.rank + 1) * each]:
            total += engine.forward_backward(row, num_tokens)
            ticks.append({name: v for name, v in engine.model_health().items() if "_updates" in name})
        numbers += [float(all_reduce_sum(total)) / num_tokens, engine.step(RATE).gradient_norm]
        after = engine.state_dict()
        changed.append(sorted(name for name in after if not torch.equal(after[name], before[name])))
        before = {name: value.clone() for name, value in after.items()}
    engine.close()
    return {"numbers": numbers, "ticks": ticks, "changed": changed, "weights": before}


def _on_two_ranks(world: World) -> dict[str, dict[str, Any]]:
    return {variant: course(world, variant, "deepspeed") for variant in VARIANTS}


def _largest_gap(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    return max(float((left[name] - right[name]).abs().max()) for name in right)


def test_two_ranks_have_the_gradients_ticks_and_weights_of_one() -> None:
    ranks = run_distributed(_on_two_ranks, 2, timeout=400)
    for variant in VARIANTS:
        alone = course(World(), variant, "local")
        both = [rank[variant] for rank in ranks]
        for found in both:
            assert max(abs(a - b) for a, b in zip(found["numbers"], alone["numbers"], strict=True)) < 2e-5, variant
            assert _largest_gap(found["weights"], alone["weights"]) < 2e-4, variant
            assert found["changed"] == alone["changed"], variant
        assert both[0]["numbers"] == both[1]["numbers"]
        # Rank r reads rows 2r and 2r + 1 of every step: their ticks are those of the same rows on one rank.
        wanted = [alone["ticks"][NUM_ROWS * step + row] for step in range(NUM_STEPS) for row in range(NUM_ROWS)]
        each = NUM_ROWS // 2
        dealt = [
            both[row // each]["ticks"][each * step + row % each] for step in range(NUM_STEPS) for row in range(NUM_ROWS)
        ]
        assert dealt == wanted, variant
    levels = ranks[0]["chain in optimizer steps"]["changed"]
    slow = [any("levels.1" in name for name in names) for names in levels]
    fast = [any("levels.0" in name for name in names) for names in levels]
    assert fast == [False, True, False, True, False] and slow == [False, False, False, True, False]
    assert any(any(entry.values()) for entry in ranks[0]["chain in tokens"]["ticks"]), "no level ever ticked"
