"""Runs of the real command in child processes, on a curriculum small enough for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hsmn_dist.config.load import load_run_config
from hsmn_dist.orchestration.run_folder import RunFolder, list_runs
from hsmn_dist.tracking.jsonl_tracker import read_series

ROOT = Path(__file__).resolve().parents[2]
DEMO = {family: ROOT / "configs" / "runs" / f"{family}_debug_demo_cpu.yaml" for family in ("hsmn", "hope")}
SMALL = [
    "tokenizer.vocab_size=400",
    "model.vocab_size=400",
    "data.max_context_tokens=96",
    "data.max_target_tokens=48",
    "training.max_steps=8",
    "training.validate_every_steps=4",
    "training.num_validation_examples=8",
    "training.checkpoint_every_steps=3",
    "training.log_every_steps=1",
    "training.global_batch_examples=8",
    "training.micro_batch_examples=2",
    "continual.fisher.num_fisher_examples=16",
    "evaluation.num_examples=2",
    "evaluation.num_loss_examples=4",
    "evaluation.max_new_tokens=6",
    *(f"curriculum.stages.{index}.datasets.0.num_examples=80" for index in range(3)),
]


@dataclass(frozen=True)
class Finished:
    """A command that ended."""

    status: int
    output: str
    errors: str


def environment() -> dict[str, str]:
    """The child's environment: one thread, the repository importable."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def command_line(*words: str) -> list[str]:
    """`hsmn-dist` with this interpreter."""
    return [sys.executable, "-m", "hsmn_dist", *words]


def run_command(*words: str, folder: Path, timeout: float = 400) -> Finished:
    """Run one command to its end."""
    done = subprocess.run(
        command_line(*words), cwd=folder, env=environment(), capture_output=True, text=True, timeout=timeout
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def settings(*assignments: str) -> list[str]:
    """`--set` words for the small curriculum and further assignments."""
    return [word for assignment in [*SMALL, *assignments] for word in ("--set", assignment)]


def one_stage(folder: Path, *assignments: str) -> Path:
    """The small demo's first stage as a configuration of its own, written into `folder`."""
    data = load_run_config(DEMO["hsmn"], [*SMALL, "tracking.backend=none", *assignments]).model_dump(mode="json")
    data["curriculum"]["stages"] = data["curriculum"]["stages"][:1]
    path = folder / "one_stage.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def only_run(root: Path) -> RunFolder:
    """The newest run under a run root."""
    return list_runs(root)[-1]


def losses(folder: RunFolder) -> dict[str, list[tuple[int, float]]]:
    """Stage folder name -> (step, training loss) points."""
    return {
        stage.name: read_series(stage / "metrics.jsonl")["train/loss_nats"]
        for stage in sorted((folder.path / "stages").iterdir())
    }


def final_weights(folder: RunFolder) -> dict[str, bytes]:
    """Parameter name -> bytes of the last stage's weights."""
    from safetensors.numpy import load_file

    last = sorted((folder.path / "stages").iterdir())[-1]
    return {name: array.tobytes() for name, array in load_file(last / "weights" / "model.safetensors").items()}


def scorecard(folder: RunFolder) -> dict[str, Any]:
    """The scorecard of a run."""
    value: dict[str, Any] = json.loads(folder.scorecard.read_text())
    return value
