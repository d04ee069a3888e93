"""Hosts with addresses of their own: a stage over two of them, and a host whose cable is pulled in the middle of a stage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hsmn_dist.config.load import load_run_config
from hsmn_dist.foundation.files import read_json
from hsmn_dist.orchestration.journal import read_events
from hsmn_dist.orchestration.run_folder import RunFolder
from hsmn_dist.tracking.jsonl_tracker import read_metric_lines
from tests.support.two_hosts import HostCluster, host_cluster, is_alive
from tests.support.whole_job import ROOT, command_line, final_weights, one_stage, only_run, run_command

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1200)]
ONE_RANK = [
    "cluster.num_nodes=1",
    "cluster.ranks_per_node=1",
    "training.max_steps=240",
    "training.global_batch_examples=16",
    "training.checkpoint_every_steps=10",
    # Between two checkpoints nothing else is committed, so that it is a checkpoint that is refused.
    "training.log_every_steps=240",
    "training.validate_every_steps=240",
]


@pytest.fixture(scope="module")
def hosts() -> Iterator[HostCluster]:
    with host_cluster(2) as cluster:
        yield cluster


def on_hosts(cluster: HostCluster, config: Path) -> subprocess.Popen[str]:
    """`hsmn-dist run` on the cluster, as started on its head."""
    words = [
        "run",
        str(config),
        "--quiet",
        "--set",
        "cluster.launcher=ray",
        "--set",
        f"cluster.ray_address={cluster.address}",
    ]
    return subprocess.Popen(
        command_line(*words),
        cwd=config.parent,
        env=cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def beat(run: RunFolder, rank: int = 0) -> dict[str, Any]:
    """A rank's last sign of life; empty before the first."""
    try:
        value: dict[str, Any] = json.loads((run.path / "heartbeats" / f"rank_{rank:05d}.json").read_text())
    except (OSError, ValueError):
        return {}
    return value


def trains_elsewhere(run: RunFolder, host: str) -> bool:
    """Whether rank 0 trains on another host."""
    now = beat(run)
    return bool(now) and now["host"] != host and now["phase"] == "train"


def wait_until(is_done: Callable[[], Any], seconds: float) -> float:
    """Seconds until it was true."""
    start = time.monotonic()
    while not is_done():
        assert time.monotonic() - start < seconds
        time.sleep(0.1)
    return time.monotonic() - start


def test_a_stage_over_two_hosts_with_zero_2_gives_the_weights_of_one_machine(
    hosts: HostCluster, tmp_path: Path
) -> None:
    config = one_stage(tmp_path, "cluster.num_nodes=2", "cluster.ranks_per_node=1")
    assert load_run_config(config).training.zero_stage == 2
    process = on_hosts(hosts, config)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output[-4000:]
    run = only_run(tmp_path / "runs")
    assert {beat(run, rank)["host"] for rank in (0, 1)} == {hosts.name(1), hosts.name(2)}
    assert (run.path / "stages" / "00_word_problems" / "COMPLETE").is_file() and run.scorecard.is_file()
    alone = tmp_path / "alone"
    alone.mkdir()
    words = ["--launcher", "local", "--set", "cluster.num_nodes=1", "--set", "cluster.ranks_per_node=2"]
    done = run_command("run", str(config), "--quiet", *words, folder=alone)
    assert done.status == 0, done.errors
    assert final_weights(run) == final_weights(only_run(alone / "runs"))


def test_smoke_measures_every_host_and_says_what_is_wrong(hosts: HostCluster, tmp_path: Path) -> None:
    """Before the next test, which costs the cluster a node."""
    command = [
        sys.executable,
        str(ROOT / "cluster" / "smoke.py"),
        "--address",
        hosts.address,
        "--json",
        "--megabytes",
        "8",
    ]
    command += ["--shared", str(tmp_path / "shared"), "--nodes", "4", "--mlflow", "http://10.77.0.254:9"]
    done = subprocess.run(command, env=hosts.environment, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 1, done.stderr[-3000:]
    answer = json.loads(done.stdout)
    values, problems = answer["values"], "\n".join(answer["problems"])
    assert values["nodes"] == values["all_reduce/ranks"] == 3
    assert values["all_reduce/bus_bytes_per_second"] > 1e6
    for index in (1, 2):
        assert abs(values[f"clock/{hosts.name(index)}_seconds"]) < 1
        assert values[f"storage/{hosts.name(index)}_write_bytes_per_second"] > 1e6
        assert f"{hosts.name(index)}: MLflow at http://10.77.0.254:9" in problems
    assert "3 of 4 nodes are there" in problems
    assert not list((tmp_path / "shared").iterdir()), "its files are removed"


def test_a_run_goes_on_elsewhere_when_its_host_is_cut_off_and_the_old_attempt_cannot_commit(
    hosts: HostCluster, tmp_path: Path
) -> None:
    config = one_stage(tmp_path, *ONE_RANK)
    process = on_hosts(hosts, config)
    try:
        wait_until(lambda: (tmp_path / "runs").is_dir() and list((tmp_path / "runs").glob("2*/heartbeats")), 120)
        run = only_run(tmp_path / "runs")
        wait_until(lambda: beat(run).get("phase") == "train" and beat(run).get("step", 0) >= 25, 240)
        # The disk is shared by all namespaces; a host that is cut off has lost the storage as well, and waits for it.
        old = beat(run)
        host = hosts.index(old["host"])
        os.kill(old["pid"], signal.SIGSTOP)
        hosts.cut(host)
        seconds = wait_until(lambda: trains_elsewhere(run, old["host"]), 180)
        first = beat(run)["step"]
        print(
            f"cut at step {old['step']} on {old['host']}; training again on {beat(run)['host']} after {seconds:.1f} s"
        )
        assert seconds < 60
        assert first >= old["step"] // 10 * 10, "it goes on from the last checkpoint"
        assert read_json(run.attempt)["group"] == 2

        # The link is back: the old process wakes and writes its checkpoint. Its raylet would end it soon; it waits for the proof.
        raylet = hosts.raylet(host)
        os.kill(raylet, signal.SIGSTOP)
        hosts.heal(host)
        os.kill(old["pid"], signal.SIGCONT)
        report = run.path / "failures" / f"fenced_00000_{old['host']}.json"
        wait_until(report.is_file, 60)
        said = read_json(report)
        assert said["kind"] == "fenced" and said["host"] == old["host"]
        assert "group 1 was replaced by" in said["message"] and "may not commit" in said["message"]
        assert "checkpoint.py" in said["traceback"], said["traceback"]
        os.kill(raylet, signal.SIGCONT)
        wait_until(lambda: not is_alive(raylet) and not is_alive(old["pid"]), 90)
        output, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, output[-4000:]
    lines = read_metric_lines(run.path / "stages" / "00_word_problems" / "metrics.jsonl")
    points = [(name, line.step) for line in lines for name in line.values]
    assert points and len(points) == len(set(points)), "every metric point is there once"
    groups = {event.get("group") for event in read_events(run.journal) if event["event"] == "stage_completed"}
    assert groups == {2}
    calm = tmp_path / "calm"
    calm.mkdir()
    done = run_command("run", str(config), "--quiet", "--launcher", "inline", folder=calm)
    assert done.status == 0, done.errors
    assert final_weights(run) == final_weights(only_run(calm / "runs")), "as if nothing had happened"
