"""How long does training stand still for a checkpoint? Synchronous and background saves beside one torch.save of the same bytes.

    python benchmarks/checkpoint.py [--parameters 2000000] [--steps 60] [--every 10] [--json] [--tiny]
    python benchmarks/checkpoint.py --demo       # the demo's model, batch and distance between saves, for the goal

One process, LocalEngine, AdamW: a checkpoint holds 12 bytes a parameter. Each way runs the same steps on the same model; a stall is
the time that `Checkpointer.save` (or torch.save of weights and moments to one file, flushed) keeps the loop waiting. `share` is all
stalls over the run's time without any; the three ways take turns, so a busy machine slows them alike. The goal looks at one save:
the median stall of a save in the background over the median time of the steps between two saves, without the stalls.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measuring import conditions, goal
from torch import nn

from hsmn_dist.config.load import load_run_config
from hsmn_dist.config.models import HsmnConfig
from hsmn_dist.config.optim import OptimConfig
from hsmn_dist.config.training import TrainingConfig
from hsmn_dist.distributed.world import World
from hsmn_dist.models.build import build_model
from hsmn_dist.models.contract import ModelInput
from hsmn_dist.training.build import build_engine
from hsmn_dist.training.checkpoint import Checkpointer, TrainState
from hsmn_dist.training.engine import Engine

GOAL = "stall of an asynchronous save as a share of the steps between two saves"
DEMO = {"examples": 16, "context": 192, "target": 96, "every": 50, "steps": 150}
"""Of configs/runs/hsmn_debug_demo_cpu.yaml, on one process."""
WAYS = ("none", "torch_save", "synchronous", "background")


def make_engine(num_parameters: int, is_demo: bool = False) -> Engine:
    """An HSMN of about that many parameters, or the demo's."""
    if is_demo:
        run = load_run_config(Path(__file__).resolve().parents[1] / "configs" / "runs" / "hsmn_debug_demo_cpu.yaml")
        torch.manual_seed(0)
        training = TrainingConfig(engine="local", global_batch_examples=DEMO["examples"])
        return build_engine(training, OptimConfig(), lambda: build_model(run.model), World())
    width = 8 * max(4, round((num_parameters / 110) ** 0.5 / 8))
    config = HsmnConfig(vocab_size=4096, d_model=width, d_feed_forward=4 * width, num_decoder_layers=4, d_compressed=64)
    torch.manual_seed(0)
    training = TrainingConfig(engine="local", global_batch_examples=4)
    return build_engine(training, OptimConfig(), lambda: build_model(config), World())


def batch(step: int, is_demo: bool = False) -> ModelInput:
    """Four examples of 64 context and 32 target tokens, or a global batch of the demo's longest examples."""
    rows, num_context, num_target = (DEMO["examples"], DEMO["context"], DEMO["target"]) if is_demo else (4, 64, 32)
    generator, vocab_size = torch.Generator().manual_seed(step), 1024 if is_demo else 4096
    context = torch.randint(4, vocab_size, (rows, num_context), generator=generator)
    target = torch.randint(4, vocab_size, (rows, num_target), generator=generator)
    return ModelInput(
        context, torch.ones_like(context, dtype=torch.bool), target, torch.ones_like(target, dtype=torch.bool)
    )


def torch_save(engine: Engine, folder: Path) -> None:
    """Weights and moments in one flushed file, as a plain training script does."""
    tensors, _ = engine.snapshot()
    with (folder / "plain.pt").open("wb") as stream:
        torch.save(tensors, stream)
        stream.flush()
        os.fsync(stream.fileno())


def run(way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and save in one way."""
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=arguments.folder))
    engine, keeper = make_engine(arguments.parameters, arguments.demo), Checkpointer(folder / "c", World())
    stalls: list[float] = []
    started = time.perf_counter()
    for step in range(1, arguments.steps + 1):
        inputs = batch(step, arguments.demo)
        engine.forward_backward(inputs, int(inputs.loss_mask.sum()))
        engine.step(1e-4)
        if step % arguments.every == 0 and way != "none":
            begin = time.perf_counter()
            if way == "torch_save":
                torch_save(engine, folder)
            else:
                keeper.save(engine, TrainState(step=step), in_background=way == "background")
            stalls.append(time.perf_counter() - begin)
    seconds = time.perf_counter() - started
    keeper.wait()
    num_bytes = max(
        (sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) for path in folder.glob("c/step_*")), default=0
    )
    shutil.rmtree(folder)
    return {"way": way, "seconds": seconds, "stalls_seconds": stalls, "bytes": num_bytes}


def report(results: list[dict[str, Any]], num_parameters: int, steps: int, every: int) -> dict[str, Any]:
    """Medians over the repetitions, ratios to no saving and to torch.save, and the goal."""
    rows: dict[str, Any] = {}
    for way in WAYS:
        runs = [result for result in results if result["way"] == way]
        stalls = [stall for result in runs for stall in result["stalls_seconds"]]
        rows[way] = {
            "run_seconds": statistics.median(result["seconds"] for result in runs),
            "stall_seconds": statistics.median(stalls) if stalls else 0.0,
            "largest_stall_seconds": max(stalls, default=0.0),
            "total_stall_seconds": statistics.median(sum(result["stalls_seconds"]) for result in runs),
        }
    plain = rows["none"]["run_seconds"]
    for row in rows.values():
        row["stall_share_of_run"] = row["total_stall_seconds"] / plain
        row["slowdown"] = row["run_seconds"] / plain
        row["stall_over_torch_save"] = row["stall_seconds"] / rows["torch_save"]["stall_seconds"]
    num_bytes = max(result["bytes"] for result in results)
    share = rows["background"]["stall_seconds"] / (plain / steps * every)
    return {
        "conditions": conditions(torch.get_num_threads()),
        "parameters": num_parameters,
        "checkpoint_bytes": num_bytes,
        "cores": os.cpu_count(),
        "ways": rows,
        "goals": [goal(GOAL, 0.05, share)],
    }


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=2_000_000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--folder", default=None, help="disk to write to; the system's temporary folder by default")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--demo", action="store_true", help="the demo's model, batch, steps and distance between saves")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that the script works")
    arguments = parser.parse_args()
    if arguments.demo:
        arguments.steps, arguments.every = DEMO["steps"], DEMO["every"]
    if arguments.tiny:
        arguments.parameters, arguments.steps, arguments.every, arguments.repetitions = 100_000, 4, 2, 1
    torch.set_num_threads(1)
    engine = make_engine(arguments.parameters, arguments.demo)
    num_parameters = sum(p.numel() for p in engine.module.parameters() if isinstance(p, nn.Parameter))
    results = [run(way, arguments) for _ in range(arguments.repetitions) for way in WAYS]
    table = report(results, num_parameters, arguments.steps, arguments.every)
    if arguments.json:
        print(json.dumps(table))
        return
    print(f"{num_parameters:,} parameters, {table['checkpoint_bytes']:,} bytes a checkpoint, {table['cores']} cores")
    print(f"{'way':<12} {'run s':>8} {'slowdown':>9} {'stall s':>8} {'largest':>8} {'share':>7} {'/torch.save':>11}")
    for way, row in table["ways"].items():
        print(
            f"{way:<12} {row['run_seconds']:8.2f} {row['slowdown']:9.3f} {row['stall_seconds']:8.4f} "
            f"{row['largest_stall_seconds']:8.4f} {row['stall_share_of_run']:7.3%} {row['stall_over_torch_save']:11.2f}"
        )
    for row in table["goals"]:
        print(f"goal: {row['what']}: {row['found']:.2%}, at most {row['at_most']:.0%}, reached: {row['is_reached']}")


if __name__ == "__main__":
    main()
