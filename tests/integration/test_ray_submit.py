from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from hsmn_dist.foundation.errors import ConfigError, StageFailed
from hsmn_dist.foundation.files import read_json
from hsmn_dist.orchestration import ray_jobs
from hsmn_dist.orchestration.journal import read_events
from hsmn_dist.orchestration.ray_jobs import JobRequest
from tests.support.ray_cluster import TokenCluster, free_ports, token_cluster
from tests.support.tcp_proxy import TcpProxy
from tests.support.whole_job import (
    DEMO,
    Finished,
    command_line,
    environment,
    final_weights,
    one_stage,
    only_run,
    run_command,
)

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]
SLEEPS = f"{sys.executable} -c 'import time; time.sleep(120)'"


@pytest.fixture(scope="module")
def cluster() -> Iterator[TokenCluster]:
    """Cores for two ranks and their driver."""
    with token_cluster(num_cpus=3) as running:
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
        ["bash", str(ROOT / script), *words], env=environment, capture_output=True, text=True, timeout=1500, cwd="/"
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def silent(text: str) -> None:
    """A `say` that nobody hears."""


def stamps(folder: Path, pattern: str) -> dict[Path, int]:
    """When each such file was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob(pattern)}


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
            ray_jobs.follow(ray_jobs.connect(cluster.address, cluster.token_file), identity, silent, silent)
        )
    )
    second.start()
    assert ray_jobs.follow(client, identity, written.append, silent) == 7
    second.join(timeout=60)
    assert other == [7]
    lines = "".join(written).splitlines()
    assert lines.count("begins") == lines.count("ends") == 1
    # It ended: the next submission of that name starts it again.
    said.clear()
    assert ray_jobs.submit(client, request, said.append) == identity
    assert any("submitting it again" in line for line in said)
    assert ray_jobs.stop(client, request, 60, silent)


def test_a_name_that_runs_with_other_settings_is_refused_and_an_unknown_one_is_not_stopped(
    cluster: TokenCluster, tmp_path: Path
) -> None:
    words = submit_words(DEMO["hsmn"], cluster, tmp_path)
    words = [*words[: words.index("--working-dir")], "--program", SLEEPS, "--name", "asleep"]
    unknown = run_command(*words, "--stop", folder=tmp_path)
    assert unknown.status == 2 and "no job of the name 'asleep'" in unknown.errors and "--name" in unknown.errors
    assert run_command(*words, "--detach", folder=tmp_path).status == 0
    same = run_command(*words, "--detach", folder=tmp_path)
    assert same.status == 0 and "following it" in same.errors
    edited = tmp_path / "edited.yaml"
    edited.write_text(
        DEMO["hsmn"].read_text().replace("seed: 42", "seed: 43").replace("../", f"{DEMO['hsmn'].parents[1]}/")
    )
    others = [[*words, "--set", "training.max_steps=5"], [*words, "--run-root", "/other"]]
    for other in [*others, [words[0], str(edited), *words[2:]]]:
        refused = run_command(*other, "--detach", folder=tmp_path)
        assert refused.status == 2, refused.output + refused.errors
        assert "asleep is" in refused.errors and "with other settings" in refused.errors
        assert "allowed:" in refused.errors and "--stop" in refused.errors
    stopped = run_command(*words, "--stop", folder=tmp_path)
    assert stopped.status == 0 and "ended as STOPPED" in stopped.errors
    again = run_command(*words, "--stop", folder=tmp_path)
    assert again.status == 0 and "ended as STOPPED" in again.errors


def test_without_a_digest_entrypoints_are_compared(cluster: TokenCluster) -> None:
    client = ray_jobs.connect(cluster.address, cluster.token_file)
    request = JobRequest("entrypoints", SLEEPS)
    identity = ray_jobs.submit(client, request, silent)
    with pytest.raises(ConfigError, match="with other settings") as refused:
        ray_jobs.submit(client, JobRequest("entrypoints", "true"), silent)
    assert "--name" in refused.value.action
    assert ray_jobs.submit(client, request, silent) == identity
    assert ray_jobs.stop(client, request, 60, silent)


def test_submitters_of_an_ended_name_at_the_same_moment_agree_on_one_job(cluster: TokenCluster) -> None:
    clients = [ray_jobs.connect(cluster.address, cluster.token_file) for _ in range(4)]
    request = JobRequest("at once", "sleep 20")
    identity = ray_jobs.submit(clients[0], request, silent)
    assert ray_jobs.stop(clients[0], request, 60, silent)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda client: ray_jobs.submit(client, request, silent), clients))
    assert found == [identity] * 4
    assert ray_jobs.stop(clients[0], request, 60, silent)


def test_a_follower_outlives_a_job_server_that_goes_away_and_writes_every_line_once(
    cluster: TokenCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import time; [(print('line', n, flush=True), time.sleep(0.5)) for n in range(40)]"
    request = JobRequest("lines", python(code))
    written: list[str] = []
    said: list[str] = []
    with TcpProxy(int(cluster.address.rsplit(":", 1)[1])) as proxy:
        client = ray_jobs.connect(f"http://127.0.0.1:{proxy.port}", cluster.token_file)
        identity = ray_jobs.submit(client, request, silent)
        with ThreadPoolExecutor(1) as pool:
            end = pool.submit(ray_jobs.follow, client, identity, written.append, said.append)
            for number in (3, 15):
                deadline = time.monotonic() + 120
                while f"line {number}\n" not in "".join(written):
                    assert time.monotonic() < deadline and not end.done()
                    time.sleep(0.1)
                proxy.cut()
                time.sleep(4)
                proxy.heal()
            assert end.result(timeout=120) == 0
        lines = [line for line in "".join(written).splitlines() if re.fullmatch(r"line \d+", line)]
        assert lines == [f"line {n}" for n in range(40)]
        assert "does not answer" in said[0] and "answers again" in said[1] and len(said) == 4
        monkeypatch.setattr(ray_jobs, "OUTAGE_SECONDS", 2.0)
        proxy.cut()
        with pytest.raises(StageFailed, match="gave no answer for 2 s") as failed:
            ray_jobs.follow(client, identity, silent, said.append)
        assert "submit the run again" in failed.value.action


def test_a_job_that_its_server_forgot_is_told(cluster: TokenCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs, "UNKNOWN_SECONDS", 2.0)
    client = ray_jobs.connect(cluster.address, cluster.token_file)
    with pytest.raises(StageFailed, match="does not exist"):
        ray_jobs.follow(client, "hsmn-nobody-000000", silent, silent)


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
    identity = ray_jobs.submit(client, request, silent)
    deadline = time.monotonic() + 120
    while "ready" not in client.get_job_logs(identity):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert ray_jobs.stop(client, request, 60, silent)
    assert mark.read_text() == "whole"
    assert ray_jobs.follow(client, identity, silent, silent) == 75


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
    assert re.search(r"hard_link_winners +1\n", done.output) and re.search(r"rename_winners +1\n", done.output)
    assert not list((tmp_path / "s").iterdir())


@contextmanager
def node_of_gpus_without_a_driver(cluster: TokenCluster, folder: Path) -> Iterator[None]:
    """A second node that tells Ray of two GPUs that no program can use."""
    ray = str(Path(sys.executable).parent / "ray")
    command = [ray, "start", "--block", "--address", cluster.gcs, "--node-ip-address", "127.0.0.1"]
    command += ["--num-cpus", "1", "--num-gpus", "2", "--dashboard-agent-listen-port", str(free_ports(1)[0])]
    path = folder / "node.log"
    for _ in range(4):  # Ray gives its start 30 s; on a busy machine the next one succeeds
        with path.open("wb") as log:
            node = subprocess.Popen(command, env=with_token(cluster), stdout=log, stderr=log)
        while node.poll() is None and "Ray runtime started" not in path.read_text(errors="replace"):
            time.sleep(0.5)
        if node.poll() is None:
            break
    else:
        raise AssertionError(path.read_text(errors="replace")[-2000:])
    try:
        yield
    finally:
        node.terminate()
        node.wait(timeout=60)


def test_smoke_names_the_host_that_cannot_write_has_no_driver_or_is_busy(cluster: TokenCluster, tmp_path: Path) -> None:
    host = re.escape(socket.gethostname())
    client = ray_jobs.connect(cluster.address, cluster.token_file)
    with node_of_gpus_without_a_driver(cluster, tmp_path):
        words = [cluster.address, "--megabytes", "1", "--gpus", "8"]
        done = run_script("cluster/smoke.sh", *words, "--shared", "/dev/null/s", environment=with_token(cluster))
        said = done.output.split("last available logs")[0]  # Ray prints the end of a failed job's log again
        assert done.status == 1 and "Traceback" not in said
        assert len(re.findall(rf"PROBLEM {host}: writing to /dev/null/s: NotADirectoryError", said)) == 2
        assert len(re.findall(rf"PROBLEM {host}: starting a nccl rank: RuntimeError: Ray counts", said)) == 2
        assert re.search(rf"PROBLEM 2 of 8 GPUs are there \(.*{host} has 2", said)
        busy = client.submit_job(entrypoint="sleep 300", entrypoint_num_gpus=2)
        while client.get_job_status(busy) != "RUNNING":
            time.sleep(0.5)
        done = run_script("cluster/smoke.sh", *words, "--seconds", "45", environment=with_token(cluster))
        assert done.status == 1
        said = done.output.split("last available logs")[0]
        assert len(re.findall(rf"PROBLEM {host}: starting a nccl rank: no answer within 45 s", said)) == 2
        assert client.stop_job(busy)


def test_a_rank_of_smoke_gives_up_when_another_never_comes() -> None:
    spec = importlib.util.spec_from_file_location("smoke", ROOT / "cluster" / "smoke.py")
    assert spec is not None and spec.loader is not None
    smoke = sys.modules["smoke"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(smoke)
    rank = smoke.Rank.__ray_metadata__.modified_class()
    begun = time.monotonic()
    with pytest.raises(RuntimeError) as gave_up:
        rank.all_reduce("gloo", f"127.0.0.1:{free_ports(1)[0]}", 0, 2, 1024, 3.0)
    assert time.monotonic() - begun < 60
    assert "\n" not in smoke.reason(gave_up.value)


def submit_words(config: Path, cluster: TokenCluster, run_root: Path) -> list[str]:
    """`submit` of a configuration with this checkout and this interpreter."""
    words = ["submit", str(config), "--address", cluster.address, "--token-file", str(cluster.token_file)]
    words += ["--working-dir", str(ROOT), "--program", f"{sys.executable} -m hsmn_dist"]
    return [*words, "--run-root", str(run_root)]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_jobs_prepare_train_and_evaluate(cluster: TokenCluster, tmp_path: Path) -> None:
    config, root = one_stage(tmp_path), tmp_path / "runs"
    done = run_script("jobs/prepare.sh", str(config), str(root), environment=with_token(cluster))
    assert done.status == 0, done.output[-3000:] + done.errors[-2000:]
    assert "tokenizer: " in done.output and "word_problems: " in done.output
    made = stamps(root / "prepared", "*.tar")
    done = run_script("jobs/train.sh", str(config), str(root), environment=with_token(cluster))
    assert done.status == 0, done.output[-3000:] + done.errors[-2000:]
    assert made and stamps(root / "prepared", "*.tar") == made, "prepared once"
    scores = read_json(only_run(root).path / "stages" / "00_word_problems" / "results.json")
    done = run_script("jobs/evaluate.sh", "latest", str(root), environment=with_token(cluster))
    assert done.status == 0, done.output[-3000:] + done.errors[-2000:]
    loss = scores["tasks"]["word_problems"]["nll_per_token"]
    assert re.search(rf"word_problems .*{loss:.3f}", done.output), "the loss that the run measured"


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_study_is_one_job_that_goes_on_and_is_refused_a_second_one(cluster: TokenCluster, tmp_path: Path) -> None:
    few = ["training.max_steps=2", "training.validate_every_steps=2", "training.num_validation_examples=4"]
    few += ["continual.fisher.num_fisher_examples=8", "evaluation.num_loss_examples=2"]
    few += [f"curriculum.stages.{stage}.datasets.0.num_examples=60" for stage in range(4)]
    base = str(ROOT / "configs" / "studies" / "forgetting_base.yaml")
    study: dict[str, Any] = {"name": "few", "base": base, "seeds": [0, 1], "reference": "none"}
    study["overrides"] = [*few, "cluster.launcher=ray", "cluster.ray_address=auto"]
    study["variants"] = {"none": ["continual.method=none"]}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(study))
    words = ("jobs/study.sh", str(file), str(tmp_path / "runs"))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(run_script, *words, environment=with_token(cluster))
        while not (tmp_path / "runs" / "few").exists():
            assert not first.done(), first.result()
            time.sleep(0.5)
        second = run_script(*words, environment=with_token(cluster))
        assert second.status == 2 and "this study runs as study-" in second.errors
        done = first.result(timeout=1500)
    assert done.status == 0, done.output[-3000:] + done.errors[-2000:]
    assert "the reference" in done.output and "seed 1: complete" in done.output
    report = read_json(tmp_path / "runs" / "few" / "study.json")
    assert [len(line["end_loss"]) for line in report["variants"]] == [2]
    cards = stamps(tmp_path / "runs" / "few", "scorecard.json")
    again = run_script(*words, environment=with_token(cluster))
    assert again.status == 0, again.output[-3000:] + again.errors[-2000:]
    assert len(cards) == 2 and stamps(tmp_path / "runs" / "few", "scorecard.json") == cards


def followed(words: list[str], root: Path) -> tuple[int, str, dict[int, int]]:
    """`submit` read while it runs: exit code, output; stage -> stages that were complete when its first loss came."""
    process = subprocess.Popen(
        command_line(*words),
        cwd=root.parent,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    output, complete = "", {}
    for line in process.stdout:
        output += line
        for stage in re.findall(r"stage (\d)/3 \w+:\s+step\s+\d+/150\s+train\s+loss\s+\d+\.\d+", output):
            complete.setdefault(int(stage), len(list(root.glob("2*/stages/*/COMPLETE"))))
    return process.wait(timeout=60), output, complete


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_jobs_and_submit_train_the_demo_to_the_scorecard_and_a_second_submission_finds_it(
    cluster: TokenCluster, tmp_path: Path
) -> None:
    config = DEMO["hsmn"]
    begun = time.monotonic()
    by_job = run_script("jobs/train.sh", str(config), str(tmp_path / "job"), "night", environment=with_token(cluster))
    assert by_job.status == 0, by_job.output[-3000:] + by_job.errors[-2000:]
    print(f"jobs/train.sh: {time.monotonic() - begun:.0f} s")
    first = only_run(tmp_path / "job")
    assert len(list(first.path.glob("stages/*/COMPLETE"))) == 3
    assert first.scorecard.is_file() and "Scorecard" in by_job.output
    words = submit_words(config, cluster, tmp_path / "sub")
    begun = time.monotonic()
    status, output, complete = followed(words, tmp_path / "sub")
    assert status == 0, output[-5000:]
    print(f"hsmn-dist submit: {time.monotonic() - begun:.0f} s")
    assert complete == {1: 0, 2: 1, 3: 2}, "each stage's loss is seen while it trains"
    second = only_run(tmp_path / "sub")
    assert second.scorecard.is_file() and "Scorecard" in output
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
        "cluster.cpus_per_rank=1.5",  # the ranks need every core: the driver must not wait for one beside them
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
    assert "the driver reserves none" in done.errors
    names = [event["event"] for event in read_events(run.journal)]
    assert "run_resumed" in names and names[-1] == "run_completed"
    assert only_run(tmp_path / "runs") == run, "one run, not two"
