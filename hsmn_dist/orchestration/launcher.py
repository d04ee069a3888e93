"""StageLauncher: how a group of ranks comes to life; and LocalLauncher, which uses torchrun on this machine.

Both launchers start one group for all pending stages, because a fresh group costs tens of seconds of imports. A rank that dies is
replaced by starting the group again; the ranks find the last checkpoint by themselves. A rank that stops for a reason that will not
go away leaves a failure record first, and the restarted group sees it and leaves at once.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from hsmn_dist.config.cluster import ClusterConfig
from hsmn_dist.foundation.errors import ConfigError, HsmnError, Preempted, StageFailed
from hsmn_dist.foundation.log import logger
from hsmn_dist.orchestration.attempt import check_attempt
from hsmn_dist.orchestration.failures import POLICIES, FailureKind, FailureRecord, classify, read_failures
from hsmn_dist.orchestration.oom_kills import OomKills
from hsmn_dist.orchestration.run_folder import RunFolder, resume_command
from hsmn_dist.orchestration.stage import StageSpec

log = logger(__name__)
KILL_AFTER_SECONDS = 5.0
DRIVEN = "HSMN_DIST_DRIVEN"


class StageLauncher(Protocol):
    """Runs stages in order on one group of ranks."""

    def launch(self, specs: Sequence[StageSpec]) -> None:
        """Return when every stage has its COMPLETE manifest.

        Raises:
            Preempted: the run was asked to leave and has a checkpoint.
            StageFailed: a rank failed and the retries are used up.
            HsmnError: a rank met bad input.
        """
        ...

    def stop(self) -> None:
        """End the ranks now. Safe to call twice and from another thread."""
        ...


def clear_failures(folder: RunFolder, attempt: str) -> None:
    """Forget the failure records and heartbeats of earlier launches.

    Raises:
        StageFailed: another attempt owns the run; they are those of its ranks.
    """
    check_attempt(folder, attempt)
    shutil.rmtree(folder.path / "failures", ignore_errors=True)
    shutil.rmtree(folder.path / "heartbeats", ignore_errors=True)


def raise_for_records(specs: Sequence[StageSpec], exit_message: str, error: Exception | None = None) -> None:
    """Turn the ranks' failure records into the one error that explains the end of a launch.

    Nothing is raised when every stage is complete. `exit_message` says what the launcher itself saw, `error` is what it caught.
    Ranks that were lost after the run was asked to leave were killed when the grace time was over: that is a preemption.
    """
    folder = specs[0].folder
    if all(folder.stage(spec.index, spec.name).is_complete for spec in specs):
        return
    records = read_failures(folder.path / "failures", specs[0].attempt)
    if records and records[0].kind is not FailureKind.WORKER_LOST:
        raise _error_of(records[0], folder)
    if folder.stop_request.exists():
        raise preempted(folder)
    kind = FailureKind.UNKNOWN if error is None else classify(error)
    if kind in (FailureKind.UNKNOWN, FailureKind.WORKER_LOST):
        if records:
            raise _error_of(records[0], folder)
        kind = FailureKind.WORKER_LOST
    seen = exit_message if error is None or str(error) in exit_message else f"{exit_message}; {error}"
    raise StageFailed(
        f"a rank died without a word ({seen})",
        action=f"{POLICIES[kind].advice}; resume with `{resume_command(folder)}`",
        kind=kind.value,
    )


def preempted(folder: RunFolder) -> Preempted:
    """The error of a run that left because it was asked to; worded by what it goes on from."""
    stages = sorted(path for path in (folder.path / "stages").glob("[0-9]*") if not (path / "COMPLETE").is_file())
    saved = sorted(path.parent.name for path in stages[0].glob("checkpoints/step_*/manifest.json")) if stages else []
    if saved:
        goes_on = f"it goes on from the checkpoint of step {int(saved[-1][5:])} of stage {stages[0].name}"
    elif stages:
        goes_on = f"stage {stages[0].name} has no checkpoint yet and begins again"
    else:
        goes_on = "it goes on behind the stages that are complete"
    return Preempted(
        f"the run was asked to leave; {goes_on}",
        allowed="starting the same command again",
        action=resume_command(folder),
    )


def _error_of(record: FailureRecord, folder: RunFolder) -> HsmnError:
    if record.kind is FailureKind.PREEMPTED:
        return preempted(folder)
    if record.kind is FailureKind.BAD_INPUT:
        return ConfigError(record.found, allowed=record.allowed, action=record.action)
    policy = POLICIES[record.kind]
    return StageFailed(
        f"rank {record.rank} on {record.host}: {record.message}",
        action=f"{policy.advice} (failures/rank_{record.rank:05d}.json has the traceback); "
        f"resume with `{resume_command(folder)}`",
        kind=record.kind.value,
        rank=record.rank,
    )


def free_port() -> int:
    """A TCP port that is free on the loopback interface now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def descendants(pid: int) -> list[int]:
    """Living processes below `pid`, by /proc; none where there is no /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found, frontier = [], [pid]
    while frontier:
        frontier = [child for parent in frontier for child in children.get(parent, [])]
        found += frontier
    return found


class LocalLauncher:
    """torchrun on this machine. Restarts the group up to `cluster.max_failures` times."""

    def __init__(self, cluster: ClusterConfig) -> None:
        if cluster.num_nodes != 1:
            raise ConfigError(
                f"cluster.num_nodes = {cluster.num_nodes} with the local launcher",
                allowed="one node with `--launcher local`",
                action="use `--launcher ray`, or set cluster.num_nodes to 1",
            )
        self._cluster = cluster
        self._process: subprocess.Popen[bytes] | None = None

    def launch(self, specs: Sequence[StageSpec]) -> None:
        """Start torchrun for all stages and wait. Output of the ranks goes to `ranks.log` in the run folder."""
        folder = specs[0].folder
        clear_failures(folder, specs[0].attempt)
        kills = OomKills()
        with (folder.path / "ranks.log").open("ab") as output:
            self._process = subprocess.Popen(
                self._command(specs),
                env=torchrun_environment(self._cluster),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            status = self._process.wait()
        self._process = None
        killed = kills.error_since_start()
        raise_for_records(specs, f"torchrun ended with status {status}; see {folder.path / 'ranks.log'}", killed)

    def stop(self) -> None:
        """Send TERM to torchrun, which passes it to the ranks; what is left after a few seconds is killed."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):  # it ended between the look and the signal
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(KILL_AFTER_SECONDS)
        except subprocess.TimeoutExpired:  # a rank that is stopped or stuck in the kernel does not hear TERM
            for member in [*descendants(process.pid), process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member, signal.SIGKILL)

    def _command(self, specs: Sequence[StageSpec]) -> list[str]:
        words = [sys.executable, "-m", "hsmn_dist.orchestration.end_with_parent", str(os.getpid())]
        words += ["torch.distributed.run"]
        words += ["--nnodes", "1", "--nproc-per-node", str(self._cluster.ranks_per_node)]
        words += ["--max-restarts", str(self._cluster.max_failures)]
        words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1"]
        words += ["-m", "hsmn_dist", "stage", "--run-folder", specs[0].run_folder, "--attempt", specs[0].attempt]
        words += ["--ends-with-parent"]
        return [*words, "--index", str(specs[0].index), "--through", str(specs[-1].index)]


def torchrun_environment(cluster: ClusterConfig) -> dict[str, str]:
    """`rank_environment` for a group that may be started again.

    By default torchrun 2.13 keeps one store for all its rounds: the ranks of a second round read the addresses of the dead
    ones of the first, wait for minutes, and fail. Without sharing, each round has a store of its own.
    """
    return {**rank_environment(cluster), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", DRIVEN: "1"}


def was_started_by_driver() -> bool:
    """Whether a driver started this rank: it clears stop requests, reads failure records and has the exit code."""
    return DRIVEN in os.environ


def rank_environment(cluster: ClusterConfig) -> dict[str, str]:
    """Environment of a rank: thread count, and DeepSpeed told that there is no accelerator on CPU runs."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(cluster.threads_per_rank), "PYTHONUNBUFFERED": "1"}
    if cluster.device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH", "")]))
    return environment
