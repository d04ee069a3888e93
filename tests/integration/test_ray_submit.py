from __future__ import annotations

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
from hsmn_dist.orchestration.ray_jobs import JobRequest
from tests.support.ray_cluster import TokenCluster, token_cluster

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cluster() -> Iterator[TokenCluster]:
    with token_cluster() as running:
        yield running


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
