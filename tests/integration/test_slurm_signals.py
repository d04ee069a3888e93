"""The printed script in a real bash: what it does when it is asked to leave, and what it says to Slurm.

Slurm's words (srun, squeue, scontrol) and Ray's are stand-ins on the path that only write down how they were called; the script as a
whole runs under a real Slurm in test_slurm_real.py.
"""

from __future__ import annotations

import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hsmn_dist.config.load import load_run_config
from hsmn_dist.orchestration.slurm_script import slurm_script
from hsmn_dist.orchestration.slurm_settings import SlurmSettings
from tests.support.manifests import ROOT

DEMO = ROOT / "configs" / "runs" / "hsmn_debug_demo_cpu.yaml"
JOB = 90_000_000 + os.getpid()  # its folder is /tmp/r<JOB>: no job of Slurm's has such a number
# Says that it is there when it is: a bash that is about to `exec` loses a signal.
SLEEPER = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(float(sys.argv[2]))"
WORDS = {
    "srun": 'while [[ "${1:-}" == --* ]]; do shift; done\nexec "$@"',
    "scontrol": 'if [ "$1 $2" = "show hostnames" ]; then echo n1; else echo "scontrol $*" >> "$CALLS"; fi',
    "squeue": 'echo "squeue $*" >> "$CALLS"\necho "$STATE"',
    "ray": "exec sleep 60",
    "apptainer": 'echo "apptainer $*" >> "$CALLS"\nwhile [ "${1:-}" != /i.sif ]; do shift; done\nshift\nexec "$@"',
    # The join script, or the question to MLflow, which the real interpreter answers.
    "python": 'if [[ "$2" == *urllib* ]]; then exec "$REAL_PYTHON" "$@"; fi\n'
    'exec "$REAL_PYTHON" -c "$SLEEPER" joining "$JOIN_SECONDS"',
    # Given seconds, it dies of TERM as a driver does that does not listen yet.
    "hsmn-dist": 'echo "hsmn-dist $*" >> "$CALLS"\nif [ "$RUN_SECONDS" = 0 ]; then exit "$RUN_CODE"; fi\n'
    'exec "$REAL_PYTHON" -c "$SLEEPER" driving "$RUN_SECONDS"',
}


@dataclass
class Batch:
    """A batch script that can be started in a folder of stand-ins."""

    folder: Path
    settings: dict[str, object] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def start(self) -> subprocess.Popen[str]:
        words = self.folder / "words"
        words.mkdir()
        for name, body in WORDS.items():
            (words / name).write_text(f"#!/bin/bash\n{body}\n")
            (words / name).chmod(0o755)
        settings = SlurmSettings(**{"setup": ":", **self.settings})  # type: ignore[arg-type]
        path = self.folder / "job.sbatch"
        path.write_text(slurm_script(load_run_config(DEMO), "demo.yaml", settings))
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RAY"))},
            **{"PATH": f"{words}:{os.environ['PATH']}", "CALLS": str(self.folder / "calls"), "STATE": "RUNNING"},
            **{
                "REAL_PYTHON": sys.executable,
                "SLEEPER": SLEEPER,
                "JOIN_SECONDS": "0",
                "RUN_SECONDS": "0",
                "RUN_CODE": "0",
            },
            **{"SLURM_SUBMIT_DIR": str(self.folder), "SLURM_JOB_ID": str(JOB), "SLURM_JOB_NODELIST": "n1"},
            **self.environment,
        }
        with (self.folder / "log").open("w") as log:
            return subprocess.Popen(["bash", str(path)], env=environment, stdout=log, stderr=log, text=True)

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.is_file() else []

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def end(self, process: subprocess.Popen[str]) -> int:
        """Exit code; nothing of the job is left."""
        code = process.wait(timeout=60)
        assert not Path(f"/tmp/r{JOB}").exists() and list(self.folder.glob(".ray_token_*")) == []
        return code


def appears(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
@pytest.mark.parametrize("moment", ["setting", "joining", "driving"])
def test_a_job_that_is_asked_to_leave_queues_itself_again_at_any_moment(
    number: signal.Signals, moment: str, tmp_path: Path
) -> None:
    environment = {"JOIN_SECONDS": "60" if moment == "joining" else "0", "RUN_SECONDS": "60"}
    batch = Batch(tmp_path, {"setup": "touch setting; sleep 1"}, environment)
    process = batch.start()
    appears(tmp_path / moment)
    process.send_signal(number)
    process.send_signal(number)  # Slurm sends it twice
    assert batch.end(process) == 75, batch.log()
    expected = [f"squeue --noheader --jobs={JOB} --format=%T", f"scontrol requeue {JOB}"]
    assert [call for call in batch.calls() if not call.startswith("hsmn-dist")] == expected
    assert any(call.startswith("hsmn-dist") for call in batch.calls()) == (moment == "driving")


def test_a_process_whose_end_comes_with_a_signal_is_not_waited_for_again(tmp_path: Path) -> None:
    script = slurm_script(load_run_config(DEMO), "demo.yaml", SlurmSettings(setup=":"))
    words = script[script.index("ask() {") : script.index("trap clean EXIT")]
    path = tmp_path / "words.sh"
    # Ray's place: while it lives, bash that missed the driver's end waits for some other one.
    first, last = 'asked="" driver="" code=0', 'run sleep 60 || code=$?\nkill -KILL "$ray"\nexit "$code"'
    lines = [first, words, "sleep 60 &", "ray=$!", last]
    path.write_text("\n".join(lines))
    batches = [subprocess.Popen(["bash", str(path)], stderr=subprocess.DEVNULL) for _ in range(16)]
    time.sleep(1)
    for batch in batches:
        for _ in range(40):
            batch.send_signal(signal.SIGTERM)
            time.sleep(0.0002)
    try:
        assert [batch.wait(timeout=30) for batch in batches] == [143] * len(batches)
    finally:
        for batch in batches:
            batch.kill()


def test_a_task_of_an_array_speaks_of_itself_alone(tmp_path: Path) -> None:
    batch = Batch(tmp_path, {"array": "0-3"}, {"RUN_CODE": "75"})
    batch.environment |= {"SLURM_ARRAY_JOB_ID": str(JOB), "SLURM_ARRAY_TASK_ID": "3"}
    assert batch.end(batch.start()) == 75, batch.log()
    driven, *asked = batch.calls()
    assert driven.endswith("--name hsmn_debug_demo_cpu-many_nodes-3 --set seed=45")
    assert asked == [f"squeue --noheader --jobs={JOB}_3 --format=%T", f"scontrol requeue {JOB}_3"]


@pytest.mark.parametrize(
    ("code", "state"), [("0", "RUNNING"), ("1", "RUNNING"), ("2", "RUNNING"), ("75", "COMPLETING")]
)
def test_a_job_that_ended_or_was_cancelled_is_not_queued_again(code: str, state: str, tmp_path: Path) -> None:
    batch = Batch(tmp_path, {}, {"RUN_CODE": code, "STATE": state})
    assert batch.end(batch.start()) == int(code), batch.log()
    assert not any(call.startswith("scontrol") for call in batch.calls())


def test_everything_runs_in_the_container_and_sees_its_folders(tmp_path: Path) -> None:
    batch = Batch(tmp_path, {"container": "/i.sif", "setup": "", "binds": ("/a b",), "run_root": "elsewhere"})
    assert batch.end(batch.start()) == 0, batch.log()
    calls = [call.replace(str(tmp_path.resolve()), "HERE") for call in batch.calls() if call.startswith("apptainer")]
    assert len(calls) == 3, "Ray, the wait for it, the driver"
    head = "apptainer exec --nv --bind /a b --bind HERE --bind HERE/elsewhere --bind HERE /i.sif "
    assert all(call.startswith(head) for call in calls)
    assert (tmp_path / "elsewhere").is_dir()


@pytest.fixture
def server() -> Iterator[str]:
    """Something that answers, with 401 as a server with passwords does."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


def test_a_tracker_that_answers_is_not_warned_of(server: str, tmp_path: Path) -> None:
    batch = Batch(tmp_path, {"mlflow_uri": server})
    assert batch.end(batch.start()) == 0, batch.log()
    assert "warning" not in batch.log()


def test_a_tracker_out_of_reach_is_a_warning_and_the_run_starts(tmp_path: Path) -> None:
    batch = Batch(tmp_path, {"mlflow_uri": "http://127.0.0.1:9"})
    assert batch.end(batch.start()) == 0, batch.log()
    assert "does not reach MLflow at http://127.0.0.1:9" in batch.log()
    assert any(call.startswith("hsmn-dist ensure") for call in batch.calls())
