"""A real Slurm of two nodes on this machine: the printed script runs a curriculum, is asked to leave, is requeued, and ends alike."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hsmn_dist.cli.main import COMMANDS
from hsmn_dist.config.load import load_run_config, write_resolved
from hsmn_dist.orchestration.slurm_script import SlurmSettings, slurm_script
from tests.support.shared import shared_file

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(3000)]
ROOT = Path(__file__).resolve().parents[2]
CHANGES = [
    "cluster.num_nodes=2",
    "cluster.ranks_per_node=1",
    "training.max_steps=30",
    "training.checkpoint_every_steps=10",
    "training.validate_every_steps=15",
    "tracking.backend=none",
    "evaluation.num_examples=2",
    "evaluation.num_loss_examples=4",
    "evaluation.max_new_tokens=4",
    "evaluation.bootstrap_samples=0",
    "continual.fisher.num_fisher_examples=8",
]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    if shutil.which("slurmctld") is None or os.geteuid() != 0:
        pytest.skip("no Slurm: apt-get install -y --no-install-recommends slurm-wlm slurmctld slurmd munge, as root")
    if "ensure" not in COMMANDS:
        pytest.skip("the command `ensure` is not on the command line")
    script = shared_file("tools", "slurm_local.sh")
    home = Path(tempfile.mkdtemp(prefix="sl", dir="/tmp"))
    os.environ["SLURM_CONF"] = str(home / "s" / "slurm.conf")
    environment = {**os.environ, "SLURM_LOCAL_DIR": str(home / "s")}
    subprocess.run(["bash", str(script), "up", "2"], env=environment, check=True, timeout=60)
    try:
        yield home
    finally:
        subprocess.run(["bash", str(script), "down"], env=environment, check=False, timeout=60)
        os.environ.pop("SLURM_CONF")
        shutil.rmtree(home, ignore_errors=True)


def submit(folder: Path, name: str) -> str:
    """Queue the demo under a name; returns the job's number."""
    config_path = folder / "demo.yaml"
    demo = ROOT / "configs" / "runs" / "hsmn_debug_demo_cpu.yaml"
    config = load_run_config(demo, [*CHANGES, f"run_root={folder / 'runs'}"])
    write_resolved(config, config_path)
    programs = Path(sys.executable).parent
    setup = f"export PATH={programs}:$PATH PYTHONPATH={ROOT} OMP_NUM_THREADS=1"
    text = slurm_script(config, str(config_path), SlurmSettings(setup=setup, time_limit="60:00"))
    path = folder / f"{name}.sbatch"
    path.write_text(text.replace(f'--name "{config.name}"', f'--name "{name}"'))
    result = subprocess.run(["sbatch", "--parsable", str(path)], cwd=folder, capture_output=True, text=True, check=True)
    return result.stdout.strip()


def state(job: str) -> str:
    """Slurm's word for a job."""
    text = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=True).stdout
    return text.split("JobState=")[1].split()[0]


def wait_until(is_done: Callable[[], bool], seconds: float = 1200.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_done():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def run_of(folder: Path, name: str) -> Path:
    return folder / "runs" / str(json.loads((folder / "runs" / "names" / f"{name}.json").read_text())["run_id"])


def weights(run: Path) -> dict[str, str]:
    """Digest of the weights after each stage."""
    files = sorted(run.glob("stages/*/weights/model.safetensors"))
    return {path.parts[-3]: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def ray_processes(job: str) -> list[str]:
    """Command lines of live processes that belong to a job's Ray."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            is_zombie = (path / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        except OSError:
            continue
        if f"/tmp/r{job}/" in words and not is_zombie:
            found.append(words[:120])
    return found


def test_a_job_that_is_asked_to_leave_is_requeued_and_ends_with_the_same_weights(folder: Path) -> None:
    plain = submit(folder, "plain")
    wait_until(lambda: state(plain) not in ("PENDING", "RUNNING", "COMPLETING"))
    assert state(plain) == "COMPLETED", (folder / f"slurm-hsmn_debug_demo_cpu-{plain}.log").read_text()[-3000:]
    assert ray_processes(plain) == []

    asked = submit(folder, "asked")
    record = folder / "runs" / "names" / "asked.json"

    def trains_second_stage() -> bool:
        try:
            beat = json.loads((run_of(folder, "asked") / "heartbeats" / "rank_00000.json").read_text())
        except (OSError, ValueError):
            return False
        return bool(beat["stage_index"] == 1 and beat["phase"] == "train" and beat["step"] >= 13)

    wait_until(lambda: record.is_file() and trains_second_stage())
    subprocess.run(["scancel", "--signal=TERM", "--batch", asked], check=True)

    def has_ended() -> bool:
        now = state(asked)
        if now == "PENDING":  # Slurm waits two minutes before it starts a requeued job
            subprocess.run(["scontrol", "update", f"JobId={asked}", "StartTime=now"], check=False)
        return now not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED")

    wait_until(has_ended)
    assert state(asked) == "COMPLETED"
    events = [
        json.loads(line)["event"] for line in (run_of(folder, "asked") / "journal.jsonl").read_text().splitlines()
    ]
    assert "run_preempted" in events and "run_resumed" in events
    assert weights(run_of(folder, "asked")) == weights(run_of(folder, "plain"))
    assert len(weights(run_of(folder, "plain"))) == 3
    assert ray_processes(asked) == []
