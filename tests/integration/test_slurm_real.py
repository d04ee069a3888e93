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
from typing import Any

import pytest

from hsmn_dist.config.load import load_run_config, write_resolved
from hsmn_dist.config.study import load_study
from hsmn_dist.orchestration.slurm_script import slurm_script, study_slurm_script
from hsmn_dist.orchestration.slurm_settings import SlurmSettings
from hsmn_dist.orchestration.study import study_runs
from tests.support.tiny_study import write_tiny_study

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(3000)]
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "support" / "slurm_local.sh"
INSTALL_SECONDS = 300
WAITING = ("PENDING", "RUNNING", "COMPLETING")
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
    if os.geteuid() != 0:
        pytest.skip("a Slurm of one's own needs root")
    # timeout(1) ends apt as well; Python's would leave it behind, holding the package lock.
    words = ["timeout", "--kill-after=10", str(INSTALL_SECONDS), "bash", str(SCRIPT), "install"]
    installed = subprocess.run(words, capture_output=True, text=True)
    if installed.returncode in (124, 137):
        pytest.skip(f"Slurm was not installed within {INSTALL_SECONDS} s (a slow or absent package mirror)")
    if installed.returncode != 0:
        said = ["no message", *installed.stderr.strip().splitlines()][-1]
        pytest.skip(f"Slurm cannot be installed here (exit code {installed.returncode}): {said}")
    home = Path(tempfile.mkdtemp(prefix="sl", dir="/tmp"))  # a socket path has 107 bytes at most
    os.environ["SLURM_CONF"] = str(home / "s" / "slurm.conf")
    try:
        subprocess.run(["bash", str(SCRIPT), "up", str(home / "s"), "2"], check=True, timeout=120)
        yield home
    finally:
        subprocess.run(["bash", str(SCRIPT), "down", str(home / "s"), "2"], check=False, timeout=120)
        os.environ.pop("SLURM_CONF")
        shutil.rmtree(home, ignore_errors=True)


def setup() -> str:
    """Makes this checkout's `hsmn-dist` and `ray` available on the nodes."""
    return f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={ROOT} OMP_NUM_THREADS=1"


def submit(folder: Path, name: str) -> str:
    """Queue the demo under a name; returns the job's number."""
    config_path = folder / "demo.yaml"
    demo = ROOT / "configs" / "runs" / "hsmn_debug_demo_cpu.yaml"
    config = load_run_config(demo, [*CHANGES, f"run_root={folder / 'runs'}"])
    write_resolved(config, config_path)
    return sbatch(folder, name, slurm_script(config, str(config_path), SlurmSettings(setup=setup(), name=name)))


def submit_study(folder: Path, command: str = "") -> str:
    """Queue an array of the two runs of a tiny study, or of another command; returns the array's number."""
    folder.mkdir()
    path = write_tiny_study(folder)
    study = load_study(path)
    configs = [run.config for run in study_runs(path, study, Path("runs"))]
    text = study_slurm_script(study, str(path), configs, SlurmSettings(kind="one_node", setup=setup()))
    if command:
        driver = next(line for line in text.splitlines() if "hsmn-dist study" in line)
        text = text.replace(driver, f'  run "${{prefix[@]}}" {command} || code=$?')
    return sbatch(folder, "array", text)


def sbatch(folder: Path, name: str, text: str) -> str:
    path = folder / f"{name}.sbatch"
    path.write_text(text)
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


def heartbeat(folder: Path, name: str) -> dict[str, Any]:
    """Where rank 0 of a run stands; empty before it does."""
    try:
        beat: dict[str, Any] = json.loads((run_of(folder, name) / "heartbeats" / "rank_00000.json").read_text())
    except (OSError, ValueError):
        return {}
    return beat


def trains(folder: Path, name: str, stage: int, step: int) -> bool:
    beat = heartbeat(folder, name)
    return bool(beat and beat["stage_index"] == stage and beat["phase"] == "train" and beat["step"] >= step)


def log_of(folder: Path, job: str) -> str:
    return (folder / f"slurm-hsmn_debug_demo_cpu-{job}.log").read_text()[-4000:]


def starts_again_soon(job: str) -> str:
    """State of a job; one that was queued again need not wait two minutes, but until its old credential's second is over."""
    now = state(job)
    if now == "PENDING":
        time.sleep(5)
        subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=False)
    return now


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> dict[str, str]:
    """Weights of a job that nobody disturbs."""
    job = submit(folder, "plain")
    wait_until(lambda: state(job) not in WAITING)
    assert state(job) == "COMPLETED", log_of(folder, job)
    assert ray_processes(job) == [] and not Path(f"/tmp/r{job}").exists()
    run = run_of(folder, "plain")
    assert (run / "scorecard.md").is_file()
    beats = [json.loads(path.read_text()) for path in sorted((run / "heartbeats").glob("rank_*.json"))]
    assert [beat["rank"] for beat in beats] == [0, 1]
    found = weights(run)
    assert len(found) == 3
    return found


def test_a_job_that_is_asked_to_leave_is_requeued_and_ends_with_the_same_weights(
    folder: Path, undisturbed: dict[str, str]
) -> None:
    job = submit(folder, "asked")
    wait_until(lambda: trains(folder, "asked", 1, 13))
    subprocess.run(["scancel", "--signal=TERM", "--batch", job], check=True)
    wait_until(lambda: starts_again_soon(job) not in (*WAITING, "REQUEUED"))
    assert state(job) == "COMPLETED", log_of(folder, job)
    lines = (run_of(folder, "asked") / "journal.jsonl").read_text().splitlines()
    events = [json.loads(line)["event"] for line in lines]
    assert "run_preempted" in events and "run_resumed" in events
    assert weights(run_of(folder, "asked")) == undisturbed
    assert ray_processes(job) == []


def test_a_cancelled_job_leaves_no_process_and_is_not_queued_again(folder: Path) -> None:
    job = submit(folder, "cancelled")
    wait_until(lambda: trains(folder, "cancelled", 0, 5))
    assert ray_processes(job)
    subprocess.run(["scancel", job], check=True)
    wait_until(lambda: state(job) not in WAITING, 240)
    assert state(job) == "CANCELLED"
    wait_until(lambda: ray_processes(job) == [], 60)
    assert not Path(f"/tmp/r{job}").exists()
    time.sleep(3)
    assert state(job) == "CANCELLED"


def test_a_job_that_is_asked_while_ray_joins_is_queued_again(folder: Path) -> None:
    job = submit(folder, "early")
    wait_until(lambda: bool(ray_processes(job)), 120)
    subprocess.run(["scancel", "--signal=TERM", "--batch", job], check=True)
    wait_until(lambda: state(job) != "RUNNING", 60)
    wait_until(lambda: state(job) == "PENDING", 60)
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=True).stdout
    subprocess.run(["scancel", job], check=True)
    assert "Restarts=1" in shown
    assert not (folder / "runs" / "names" / "early.json").exists(), "the run had not begun"
    wait_until(lambda: ray_processes(job) == [], 60)
    assert not Path(f"/tmp/r{job}").exists()


def test_a_task_of_an_array_queues_itself_again_and_no_other(folder: Path) -> None:
    """Task 1, which has the array's own number, leaves at its first start while task 0 runs."""
    home = folder / "two"
    inner = 'echo "$SLURM_ARRAY_TASK_ID ${SLURM_RESTART_COUNT:-0} $SLURM_JOB_ID" >> starts; '
    inner += 'if [ "$SLURM_ARRAY_TASK_ID" = 0 ]; then sleep 20; elif [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then sleep 5; exit 75; fi'
    job = submit_study(home, f"bash -c '{inner}'")
    wait_until(lambda: starts_again_soon(f"{job}_1") not in (*WAITING, "REQUEUED"), 180)
    wait_until(lambda: state(f"{job}_0") not in WAITING, 180)
    starts = sorted(line.split() for line in (home / "starts").read_text().splitlines())
    assert [start[:2] for start in starts] == [["0", "0"], ["1", "0"], ["1", "1"]]
    assert starts[1][2] == job, "the case that is told apart"
    assert state(f"{job}_0") == state(f"{job}_1") == "COMPLETED"


def test_an_array_runs_a_study_and_its_last_task_writes_the_report(folder: Path) -> None:
    home = folder / "study"
    job = submit_study(home)
    wait_until(lambda: all(state(f"{job}_{task}") not in WAITING for task in range(2)), 600)
    logs = "\n".join(path.read_text()[-2000:] for path in sorted(home.glob("slurm-tiny-*.log")))
    assert [state(f"{job}_{task}") for task in range(2)] == ["COMPLETED"] * 2, logs
    root = home / "runs" / "tiny"
    assert len(list(root.glob("*/scorecard.json"))) == 2
    assert len(json.loads((root / "study.json").read_text())["variants"]) == 2
