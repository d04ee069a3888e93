"""Slurm scripts: what is printed, what is shipped, and (slow) a real Slurm of two nodes on this machine."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from hsmn_dist.config.load import load_run_config
from hsmn_dist.orchestration.slurm_script import KINDS, SlurmSettings, slurm_script
from tests.support import manifests

ROOT = Path(__file__).resolve().parents[2]
LARGE = "configs/runs/hope_large_builtin_multi_node.yaml"
DEMO = "configs/runs/hsmn_debug_demo_cpu.yaml"


def script(path: str = LARGE, changes: tuple[str, ...] = (), **settings: str) -> str:
    return slurm_script(load_run_config(ROOT / path, changes), path, SlurmSettings(**settings))  # type: ignore[arg-type]


def directives(text: str) -> dict[str, str]:
    rows = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH --")]
    return {key: value for key, _, value in (row.partition("=") for row in rows)}


@pytest.mark.parametrize("kind", KINDS)
def test_shipped_scripts_are_what_the_command_prints(kind: str) -> None:
    shipped = (ROOT / "cluster" / "slurm" / f"{kind}.sbatch").read_text(encoding="utf-8")
    assert shipped == script(kind=kind), f"hsmn-dist slurm {LARGE} --kind {kind} > cluster/slurm/{kind}.sbatch"


def test_directives_follow_the_configuration() -> None:
    many = directives(script())
    assert (many["nodes"], many["gpus-per-node"], many["cpus-per-task"]) == ("8", "8", "64")
    assert "requeue" in many and many["signal"] == "B:USR1@300"
    assert directives(script(kind="one_node"))["nodes"] == "1"
    assert directives(script(kind="preemptible"))["qos"] == "preemptible"
    demo = directives(script(DEMO, kind="one_node"))
    assert "gpus-per-node" not in demo and demo["cpus-per-task"] == "2"


def test_no_placeholder_is_left_and_options_reach_the_script() -> None:
    text = script(container="/images/hsmn dist.sif", setup="", mlflow_uri="http://tracker:5000", account="lab")
    assert re.findall("@[a-z]+@", text) == []
    assert "image='/images/hsmn dist.sif'" in text
    assert "tracking.uri=http://tracker:5000" in text
    assert directives(text)["account"] == "lab"


def test_an_array_gives_each_task_a_name_and_a_seed() -> None:
    text = script(DEMO, array="0-3")
    assert directives(text)["array"] == "0-3"
    assert '--name "hsmn_debug_demo_cpu-$SLURM_ARRAY_TASK_ID"' in text
    assert '--set "seed=$((42 + SLURM_ARRAY_TASK_ID))"' in text


@pytest.mark.parametrize(
    "settings", [{}, {"array": "0-7"}, {"container": "/images/a b.sif", "setup": ""}, {"mlflow_uri": "http://t:5000"}]
)
def test_every_filled_in_script_passes_shellcheck_and_bash(settings: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "job.sbatch"
    path.write_text(script(**settings), encoding="utf-8")
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, timeout=30).returncode == 0
    assert manifests.shell_errors(path) == ""


def test_a_run_cannot_smuggle_shell_into_the_script() -> None:
    text = slurm_script(load_run_config(ROOT / DEMO), "a; rm -rf $HOME.yaml", SlurmSettings())
    assert "'a; rm -rf $HOME.yaml'" in text
