"""A real MLflow database and a real MLflow server: every metric point is there exactly once, whatever happens."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import pytest

mlflow = pytest.importorskip("mlflow")

from hsmn_dist.config.tracking import TrackingConfig  # noqa: E402
from hsmn_dist.tracking.build import TrackedRun, build_tracker, sync_run  # noqa: E402
from hsmn_dist.tracking.jsonl_tracker import JsonlTracker, read_metric_lines  # noqa: E402
from tests.support.postgres import postgres_server  # noqa: E402


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """One run root for the module: making a new database takes seconds."""
    return tmp_path_factory.mktemp("runs")


def config(**changes) -> TrackingConfig:
    quick = {"flush_seconds": 0.1, "finish_timeout_seconds": 60.0, "system_metrics_seconds": 0.0}
    return TrackingConfig(**{**quick, **changes})


def runs_of(client, run_id: str) -> dict:
    """Stage -> MLflow run; fails if one was made twice."""
    experiment = client.get_experiment_by_name("hsmn_dist")
    found = client.search_runs([experiment.experiment_id], f"tags.`hsmn_dist.run_id` = '{run_id}'")
    stages = [run.data.tags["hsmn_dist.stage"] for run in found]
    assert len(set(stages)) == len(stages), stages
    return dict(zip(stages, found, strict=True))


def history(client, run, name: str) -> list[tuple[int, float]]:
    points = client.get_metric_history(run.info.run_id, name)
    return sorted((point.step, point.value) for point in points)


def check_exactly_once(client, run_id: str, run_folder: Path) -> int:
    """Compare the server with the files, point by point; returns the number of points."""
    runs = runs_of(client, run_id)
    total = 0
    for path in [run_folder / "metrics.jsonl", *run_folder.glob("stages/*/metrics.jsonl")]:
        expected: dict[tuple[str, str], list] = {}
        for line in read_metric_lines(path):
            for name, value in line.values.items():
                expected.setdefault((line.stage, name), []).append((line.step, value))
        for (stage, name), points in expected.items():
            assert history(client, runs[stage or "curriculum"], name) == sorted(points), (stage, name)
            total += len(points)
    return total


def test_a_curriculum_becomes_a_parent_and_children_with_everything_attached(database, tmp_path):
    run_folder = database / "run_a"
    tags = {"family": "hsmn", "git_commit": "abc"}
    parent = build_tracker(config(), TrackedRun(database, run_folder, "run_a", tags=tags))
    parent.log_params({"model": {"family": "hsmn", "d_model": 64}, "seed": 1, "name": "x" * 7000})
    parent.log_dataset("word_problems", "e" * 64, "built-in")
    note = tmp_path / "config.yaml"
    note.write_text("seed: 1\n")
    parent.log_artifact(note, "config")
    for index, stage in enumerate(["00_math", "01_code"]):
        tracker = build_tracker(
            config(system_metrics_seconds=0.05), TrackedRun(database, run_folder, "run_a", stage, tags=tags)
        )
        for step in range(25):
            tracker.log_metrics({"train/loss_nats": 2.0 / (step + 1), "train/penalty_nats": 0.0}, step)
        picture = tmp_path / "loss.png"
        picture.write_bytes(b"\x89PNG")
        tracker.log_figure(picture)
        time.sleep(0.3)
        tracker.finish("finished")
        parent.log_metrics({"transfer/forgetting": 0.1 * index, "task/bad": math.nan}, index)
    parent.finish("failed")

    client = mlflow.MlflowClient(f"sqlite:///{database}/mlflow.db")
    runs = runs_of(client, "run_a")
    assert set(runs) == {"curriculum", "00_math", "01_code"}
    root = runs["curriculum"]
    for stage in ("00_math", "01_code"):
        assert runs[stage].data.tags["mlflow.parentRunId"] == root.info.run_id
        assert runs[stage].info.status == "FINISHED"
        assert history(client, runs[stage], "train/loss_nats") == [(s, 2.0 / (s + 1)) for s in range(25)]
        assert [file.path for file in client.list_artifacts(runs[stage].info.run_id, "figures")] == ["figures/loss.png"]
        assert runs[stage].data.metrics["system/process_memory_megabytes"] > 1
    assert root.info.status == "FAILED"
    assert root.data.tags["family"] == "hsmn"
    assert root.data.params["model.d_model"] == "64"
    assert len(root.data.params["name"]) == 6000, "longer than MLflow takes: cut, not lost with its batch"
    assert [file.path for file in client.list_artifacts(root.info.run_id, "config")] == ["config/config.yaml"]
    assert root.inputs.dataset_inputs[0].dataset.name == "word_problems"
    assert math.isnan(client.get_metric_history(root.info.run_id, "task/bad")[0].value)
    assert history(client, root, "transfer/forgetting") == [(0, 0.0), (1, 0.1)]
    assert (database / "mlartifacts").is_dir(), "artifacts lie in the run root, not in the working directory"


def test_a_killed_and_resumed_stage_continues_the_same_mlflow_run(database):
    run_folder = database / "run_b"
    first = build_tracker(config(), TrackedRun(database, run_folder, "run_b", "00_a"))
    for step in range(10):
        first.log_metrics({"train/loss_nats": float(step)}, step)
    first.finish("preempted")
    client = mlflow.MlflowClient(f"sqlite:///{database}/mlflow.db")
    before = runs_of(client, "run_b")["00_a"]
    assert before.info.status == "KILLED"

    # The checkpoint held 6 steps; two further steps reach the file while no uploader runs, as after a SIGKILL.
    lost = JsonlTracker(run_folder / "stages" / "00_a", "00_a", first_step=6)
    lost.log_metrics({"train/loss_nats": 6.0}, 6)
    second = build_tracker(config(), TrackedRun(database, run_folder, "run_b", "00_a", first_step=7))
    for step in range(7, 15):
        second.log_metrics({"train/loss_nats": float(step)}, step)
    second.log_params({"seed": 1})
    second.finish("finished")
    after = runs_of(client, "run_b")["00_a"]
    assert after.info.run_id == before.info.run_id
    assert after.info.status == "FINISHED"
    assert history(client, after, "train/loss_nats") == [(step, float(step)) for step in range(15)]
    assert sync_run(run_folder) == 0, "nothing is left to send"
    assert check_exactly_once(client, "run_b", run_folder) == 15


def test_a_refused_record_is_passed_over_and_the_rest_arrives(database):
    run_folder = database / "run_c"
    tracker = build_tracker(config(), TrackedRun(database, run_folder, "run_c"))
    tracker.log_params({"seed": 1})
    tracker.log_params({"seed": 2})
    tracker.log_artifact(run_folder / "gone.txt")
    tracker.log_metrics({"a name with # in it": 1.0, "run/tokens_count": 5.0}, 0)
    tracker.finish()
    client = mlflow.MlflowClient(f"sqlite:///{database}/mlflow.db")
    run = runs_of(client, "run_c")["curriculum"]
    assert run.data.params["seed"] == "1"
    assert run.data.metrics == {"run/tokens_count": 5.0}
    assert run.info.status == "FINISHED"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def mlflow_server(folder: Path, port: int, backend: str):
    """A server of its own; killed with SIGKILL at the end, its workers too (own process group)."""
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", backend, "--artifacts-destination", str(folder / "art")]
    # Its job runners would be four more processes that import MLflow.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "server.log").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=folder, env=environment)
    try:
        deadline = time.monotonic() + 240  # 17 s on a quiet machine
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                break
            time.sleep(0.2)
        else:
            pytest.fail(f"the server did not start:\n{(folder / 'server.log').read_text()[-2000:]}")
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal_group(process, signal.SIGKILL)
        process.wait()


def signal_group(process: subprocess.Popen, number: signal.Signals) -> None:
    os.killpg(process.pid, number)


TRAINING = """
import sys, time
from pathlib import Path
from hsmn_dist.config.tracking import TrackingConfig
from hsmn_dist.tracking.build import TrackedRun, build_tracker
root, uri = Path(sys.argv[1]), sys.argv[2]
config = TrackingConfig(uri=uri, flush_seconds=0.1, finish_timeout_seconds=1.0, system_metrics_seconds=0.0)
tracker = build_tracker(config, TrackedRun(root, root / "r1", "r1", "00_a", 0))
longest = 0.0
for step in range(250):
    if step == 150:
        print("half", flush=True)
        sys.stdin.readline()
    began = time.perf_counter()
    tracker.log_metrics({"train/loss_nats": 1.0 / (step + 1), "perf/step_seconds": 0.02}, step)
    longest = max(longest, time.perf_counter() - began)
    time.sleep(0.02)
began = time.perf_counter()
tracker.finish("finished")
print(longest, time.perf_counter() - began, flush=True)
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def backend(request, tmp_path):
    """URI of the server's database; PostgreSQL's outlives the server, as SQLite's file does."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/server.db"
        return
    with postgres_server() as database:
        yield database.uri


def test_a_server_killed_in_mid_run_costs_no_step_and_no_point(tmp_path, backend):
    port = free_port()
    uri, run_folder = f"http://127.0.0.1:{port}", tmp_path / "runs" / "r1"
    with mlflow_server(tmp_path, port, backend) as server:
        command = [sys.executable, "-c", TRAINING, str(tmp_path / "runs"), uri]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as training:
            assert training.stdout.readline() == "half\n"
            signal_group(server, signal.SIGKILL)
            server.wait()
            output, _ = training.communicate("go on\n", timeout=120)
        assert training.returncode == 0
    longest_call, finish_seconds = map(float, output.split())
    # A call that waited for the network would take seconds (3 s to notice a dead server, minutes to give up on it).
    assert longest_call < 1.0
    assert finish_seconds < 5.0, "finish gives up after its time-out"
    with mlflow_server(tmp_path, port, backend):
        client = mlflow.MlflowClient(uri)
        missing = 500 - sum(count_points(client, "r1").values())
        assert missing >= 200, "the second part cannot have reached a dead server"
        assert sync_run(run_folder, uri) == missing
        assert sync_run(run_folder, uri) == 0
        assert check_exactly_once(client, "r1", run_folder) == 500
        assert runs_of(client, "r1")["00_a"].info.status == "FINISHED"


def count_points(client, run_id: str) -> Counter:
    if client.get_experiment_by_name("hsmn_dist") is None:
        return Counter()
    counts: Counter = Counter()
    for run in runs_of(client, run_id).values():
        for name in run.data.metrics:
            counts[name] += len(client.get_metric_history(run.info.run_id, name))
    return counts
