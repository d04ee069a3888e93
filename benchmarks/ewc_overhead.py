"""What EWC adds to a training step: ZeRO-2, two ranks, coupled; and the bytes that its buffers take on a rank.

    python benchmarks/ewc_overhead.py [--json] [--pairs 60]

One step with EWC and one without make a pair, in turns in which comes first, in the same processes on the same weights and batch: both meet the same machine.
The ratio is the median over pairs of rank 0's times, with a 95 percent bootstrap interval, by CPU time and by the clock. The penalty's value is
not computed: it is computed only on steps that log it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from hsmn_dist.config.models import HopeConfig
from hsmn_dist.config.optim import OptimConfig
from hsmn_dist.config.training import TrainingConfig
from hsmn_dist.continual.ewc import EwcMemory, EwcPenalty, TaskRecord
from hsmn_dist.distributed.collectives import barrier
from hsmn_dist.distributed.determinism import seed_everything
from hsmn_dist.distributed.world import World
from hsmn_dist.models.build import build_model
from hsmn_dist.models.contract import ModelInput
from hsmn_dist.training.build import build_engine
from tests.support.distributed import run_distributed

MICRO_BATCH, TOKENS, VOCAB, WARM_UP = 8, 128, 4096, 2


def batch_of(seed: int) -> ModelInput:
    """Random tokens: the time of a step does not depend on them."""
    generator = torch.Generator().manual_seed(1000 + seed)
    ids = torch.randint(4, VOCAB, (MICRO_BATCH, TOKENS), generator=generator)
    context = ids[:, :0]
    return ModelInput(context, context.bool(), ids, torch.ones_like(ids, dtype=torch.bool))


def measure(world: World, pairs: int) -> dict[str, Any]:
    """Times of steps with and without EWC on this rank, in turns."""
    torch.set_num_threads(1)
    training = TrainingConfig.model_validate(
        {
            "zero_stage": 2,
            "global_batch_examples": MICRO_BATCH * world.world_size,
            "micro_batch_examples": MICRO_BATCH,
        }
    )
    config = HopeConfig(vocab_size=VOCAB, d_model=256, num_layers=8, num_heads=8, d_feed_forward=1024, uses_cms=False)
    seed_everything(0)
    engine = build_engine(training, OptimConfig(), lambda: build_model(config), world)
    shards = engine.param_shards(with_gradients=False)
    memory = EwcMemory.empty(shards)
    for task in range(3):
        memory.add_task(shards, [torch.rand_like(s.value) * 1e-3 for s in shards], TaskRecord(f"task {task}"))
    penalties = {"without": None, "with": EwcPenalty(memory, 10.0)}
    cpu: dict[str, list[float]] = {"with": [], "without": []}
    wall: dict[str, list[float]] = {"with": [], "without": []}
    penalty_seconds: list[float] = []
    for pair in range(-WARM_UP, pairs):
        for name in sorted(penalties, reverse=pair % 2 == 0):
            penalty = penalties[name]
            barrier()
            start, started = time.process_time(), time.perf_counter()
            engine.forward_backward(batch_of(pair), float(MICRO_BATCH * TOKENS * world.world_size))
            if penalty is not None:
                before = time.process_time()
                penalty.add_gradients(engine.param_shards())
                penalty_seconds.append(time.process_time() - before)
            engine.step(1e-5)
            if pair >= 0:
                cpu[name].append(time.process_time() - start)
                wall[name].append(time.perf_counter() - started)
    num_parameters = sum(torch.Size(s.shape).numel() for s in shards)
    result = {
        "num_parameters": num_parameters,
        "bytes_per_rank": memory.num_bytes,
        "expected_bytes_per_rank": 8 * num_parameters / world.world_size,
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "penalty_seconds": statistics.median(penalty_seconds),
    }
    engine.close()
    return result


def median_ratio(times: dict[str, list[float]]) -> tuple[float, list[float]]:
    """Median over pairs of (with / without), and its 95 percent bootstrap interval."""
    ratios = [a / b for a, b in zip(times["with"], times["without"], strict=True)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), [medians[50], medians[1949]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--pairs", type=int, default=60)
    options = parser.parse_args()
    first = run_distributed(measure, 2, options.pairs, timeout=1200)[0]
    for clock in ("cpu", "wall"):
        times = first[f"{clock}_seconds"]
        first[f"{clock}_ratio"], first[f"{clock}_ratio_interval"] = median_ratio(times)
        first[f"{clock}_seconds"] = {name: statistics.median(values) for name, values in times.items()}
    first["penalty_share"] = first["penalty_seconds"] / first["cpu_seconds"]["without"]
    first["pairs"] = options.pairs
    if options.json:
        print(json.dumps(first, indent=2))
        return
    cpu, wall = (
        f"x{first[f'{clock}_ratio']:.3f} [{first[f'{clock}_ratio_interval'][0]:.3f}, {first[f'{clock}_ratio_interval'][1]:.3f}]"
        for clock in ("cpu", "wall")
    )
    print(
        f"{first['num_parameters']:,} parameters, ZeRO-2, two ranks, {options.pairs} pairs: step with EWC over step without "
        f"{cpu} (CPU), {wall} (wall); the penalty alone takes {100 * first['penalty_share']:.2f} percent of a step; "
        f"{first['bytes_per_rank']:,} bytes a rank (8 x parameters / ranks = {first['expected_bytes_per_rank']:,.0f})"
    )


if __name__ == "__main__":
    main()
