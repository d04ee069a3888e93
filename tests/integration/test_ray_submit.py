from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from hsmn_dist.foundation.errors import ConfigError
from hsmn_dist.orchestration import ray_jobs
from hsmn_dist.orchestration.journal import read_events
from hsmn_dist.orchestration.ray_jobs import JobRequest
from tests.support.ray_cluster import TokenCluster, token_cluster
from tests.support.whole_job import Finished, final_weights, one_stage, only_run, run_command

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cluster() -> Iterator[TokenCluster]:
    with token_cluster() as running:
        yield running


def jobs_environment(cluster: TokenCluster, **changes: str) -> dict[str, str]:
    """What a user of jobs/ sets."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**plain, "PATH": path, "RAY_API_SERVER_ADDRESS": cluster.address, "HOME": "/nonexistent", **changes}


def with_token(cluster: TokenCluster) -> dict[str, str]:
    return jobs_environment(cluster, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(cluster.token_file))


def run_script(script: str, *words: str, environment: dict[str, str]) -> Finished:
    """A script of the repository, run to its end."""
    done = subprocess.run(
        ["bash", str(ROOT / script), *words], env=environment, capture_output=True, text=True, timeout=500, cwd="/"
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def python(code: str) -> str:
    return f'{sys.executable} -c "{code}"'


def test_names_decide_submission_ids() -> None:
    first, second = JobRequest("my run", "true"), JobRequest("my_run", "true")
    assert first.submission_id == JobRequest("my run", "false").submission_id
    assert first.submission_id != second.submission_id
    assert "working_dir" not in first.runtime_env()
    assert JobRequest("a", "true", working_dir=".").runtime_env()["excludes"]
    assert JobRequest("a", "true", grace_seconds=60).runtime_env()["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "90"


def test_without_the_token_or_with_a_wrong_one_nothing_is_possible(cluster: TokenCluster, tmp_path: Path) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{cluster.address}/api/jobs/", timeout=10)
    assert caught.value.code == 401
    with pytest.raises(ConfigError, match="cannot be used") as refused:
        ray_jobs.connect(cluster.address)
    assert "--token-file" in refused.value.action
    wrong = tmp_path / "wrong"
    wrong.write_text("0123456789abcdef0123456789abcdef")
    with pytest.raises(ConfigError) as refused:
        ray_jobs.connect(cluster.address, wrong)
    assert "--token-file" in refused.value.action
    with pytest.raises(ConfigError, match="no such token file"):
        ray_jobs.connect(cluster.address, tmp_path / "absent")


def test_a_job_is_followed_to_its_exit_code_and_a_second_submission_follows_the_first(cluster: TokenCluster) -> None:
    client = ray_jobs.connect(cluster.address, cluster.token_file)
    code = "import sys,time; print('begins', flush=True); time.sleep(6); print('ends', flush=True); sys.exit(7)"
    request = JobRequest("exit seven", python(code))
    said: list[str] = []
    identity = ray_jobs.submit(client, request, said.append)
    assert ray_jobs.submit(client, request, said.append) == identity
    assert any("following it" in line for line in said)
    assert len([job for job in client.list_jobs() if job.submission_id == identity]) == 1
    written: list[str] = []
    other: list[int] = []
    second = threading.Thread(
        target=lambda: other.append(
            ray_jobs.follow(ray_jobs.connect(cluster.address, cluster.token_file), identity, lambda text: None)
        )
    )
    second.start()
    assert ray_jobs.follow(client, identity, written.append) == 7
    second.join(timeout=60)
    assert other == [7]
    text = "".join(written)
    assert "begins" in text and "ends" in text
    # It ended: the next submission of that name starts it again.
    said.clear()
    assert ray_jobs.submit(client, request, said.append) == identity
    assert any("submitting it again" in line for line in said)
    assert ray_jobs.stop(client, identity, 60)


def test_a_stop_gives_the_job_time_for_its_checkpoint(cluster: TokenCluster, tmp_path: Path) -> None:
    client = ray_jobs.connect(cluster.address, cluster.token_file)
    mark = tmp_path / "checkpoint"
    script = tmp_path / "job.py"
    script.write_text(
        "import pathlib, signal, sys, time\n"
        "def leave(*_):\n"
        "    time.sleep(5)\n"
        f"    pathlib.Path({str(mark)!r}).write_text('whole')\n"
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        "print('ready', flush=True)\n"
        "time.sleep(300)\n"
    )
    request = JobRequest("stopped", f"exec {sys.executable} {script}", grace_seconds=10.0)
    identity = ray_jobs.submit(client, request, lambda text: None)
    deadline = time.monotonic() + 120
    while "ready" not in client.get_job_logs(identity):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert ray_jobs.stop(client, identity, 60)
    assert mark.read_text() == "whole"
    assert ray_jobs.follow(client, identity, lambda text: None) == 75


def test_an_address_where_nobody_listens_is_explained() -> None:
    with pytest.raises(ConfigError, match="cannot be used") as refused:
        ray_jobs.connect("http://127.0.0.1:9")
    assert "8265" in refused.value.action


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "wants a token"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 32}, "does not take this token"),
        ({"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}, "nobody answers"),
    ],
)
def test_the_jobs_say_in_one_line_why_they_are_refused(
    cluster: TokenCluster, changes: dict[str, str], said: str, tmp_path: Path
) -> None:
    done = run_script("jobs/train.sh", "x.yaml", str(tmp_path), environment=jobs_environment(cluster, **changes))
    assert done.status == 2
    assert done.errors.count("\n") == 1 and said in done.errors


def test_smoke_runs_as_a_job_and_says_what_is_wrong(cluster: TokenCluster, tmp_path: Path) -> None:
    words = [cluster.address, "--shared", str(tmp_path / "s"), "--megabytes", "8", "--nodes", "2"]
    done = run_script("cluster/smoke.sh", *words, environment=with_token(cluster))
    assert done.status == 1
    assert "write_bytes_per_second" in done.output and "clock/" in done.output
    assert "PROBLEM 1 of 2 nodes are there" in done.output


def submit_words(config: Path, cluster: TokenCluster, run_root: Path) -> list[str]:
    """`submit` of a configuration with this checkout and this interpreter."""
    words = ["submit", str(config), "--address", cluster.address, "--token-file", str(cluster.token_file)]
    words += ["--working-dir", str(ROOT), "--program", f"{sys.executable} -m hsmn_dist"]
    return [*words, "--run-root", str(run_root)]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_jobs_and_submit_train_to_the_scorecard_and_a_second_submission_finds_it(
    cluster: TokenCluster, tmp_path: Path
) -> None:
    config = one_stage(tmp_path)
    by_job = run_script("jobs/train.sh", str(config), str(tmp_path / "job"), "night", environment=with_token(cluster))
    assert by_job.status == 0, by_job.output[-3000:] + by_job.errors[-2000:]
    first = only_run(tmp_path / "job")
    assert first.scorecard.is_file() and "Scorecard" in by_job.output
    words = submit_words(config, cluster, tmp_path / "sub")
    done = run_command(*words, folder=tmp_path)
    assert done.status == 0, done.output[-3000:] + done.errors[-2000:]
    second = only_run(tmp_path / "sub")
    assert final_weights(first) == final_weights(second)
    events = read_events(second.journal)
    again = run_command(*words, folder=tmp_path)
    assert again.status == 0 and "complete" in again.output + again.errors
    assert read_events(second.journal) == events, "nothing was trained again"
    refused = run_command(
        *[word for word in words if word not in ("--token-file", str(cluster.token_file))], folder=tmp_path
    )
    assert refused.status == 2 and "--token-file" in refused.errors


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_stopped_submission_keeps_its_checkpoint_and_the_next_one_resumes_it(
    cluster: TokenCluster, tmp_path: Path
) -> None:
    config = one_stage(
        tmp_path,
        "training.max_steps=1000",
        "training.validate_every_steps=500",
        "training.checkpoint_every_steps=500",
        "training.log_every_steps=100",
    )
    words = [*submit_words(config, cluster, tmp_path / "runs"), "--name", "stopped"]
    codes: list[int] = []
    follower = threading.Thread(target=lambda: codes.append(run_command(*words, folder=tmp_path).status))
    follower.start()
    deadline = time.monotonic() + 240
    while not any('"train"' in beat.read_text() for beat in (tmp_path / "runs").glob("2*/heartbeats/rank_00000.json")):
        assert time.monotonic() < deadline and follower.is_alive()
        time.sleep(0.5)
    assert run_command(*words, "--stop", folder=tmp_path).status == 0
    follower.join(timeout=120)
    assert codes == [75]
    run = only_run(tmp_path / "runs")
    assert read_events(run.journal)[-1]["event"] == "run_preempted"
    done = run_command(*words, folder=tmp_path)
    assert done.status == 0, done.output[-3000:] + done.errors[-2000:]
    names = [event["event"] for event in read_events(run.journal)]
    assert "run_resumed" in names and names[-1] == "run_completed"
    assert only_run(tmp_path / "runs") == run, "one run, not two"
