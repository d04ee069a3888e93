"""Runs by name: the same command, given twice or on two machines, starts a run once, resumes it, follows it, or finds it complete.

This is what a queue may start again whenever it likes: Slurm's requeue, a RayJob's retry, a second `submit`.

    <run_root>/names/<name>.json   {"run_id", "config_digest"}      <run_root>/names/<name>.lease   see lease.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsmn_dist.config.load import config_digest
from hsmn_dist.config.run import RunConfig
from hsmn_dist.foundation.errors import ConfigError, Preempted, StageFailed
from hsmn_dist.foundation.files import read_json, write_json
from hsmn_dist.orchestration.curriculum import Run, create_run, reopen_run
from hsmn_dist.orchestration.journal import read_events, run_status
from hsmn_dist.orchestration.lease import STALE_SECONDS, Watcher, held_lease, read_holder, try_acquire
from hsmn_dist.orchestration.run_folder import RunFolder

POLL_SECONDS = 1.0


@dataclass(frozen=True)
class NamedRun:
    """A name under a run root."""

    run_root: Path
    name: str

    @property
    def record(self) -> Path:
        """Which run the name means."""
        return self.run_root / "names" / f"{self.name}.json"

    @property
    def lease(self) -> Path:
        """Held by the process that drives it."""
        return self.run_root / "names" / f"{self.name}.lease"

    def folder(self) -> RunFolder | None:
        """The run's folder; None before its first start."""
        if not self.record.is_file():
            return None
        folder = RunFolder((self.run_root / read_json(self.record)["run_id"]).resolve())
        return folder if folder.config.is_file() else None

    def status(self) -> str:
        """new, running, complete, failed or preempted."""
        folder = self.folder()
        return "new" if folder is None else run_status(read_events(folder.journal))


def ensure_run(
    named: NamedRun,
    config: RunConfig,
    drive: Callable[[Run], None],
    say: Callable[[str], None],
    stale_seconds: float = STALE_SECONDS,
) -> RunFolder:
    """Return when the run of that name is complete, whoever drove it.

    Args:
        named: the name.
        config: what it must mean.
        drive: runs it to its end in this process; called under the lease.
        say: one line for the user.
        stale_seconds: silence after which another process's lease is taken over.

    Raises:
        ConfigError: the name means a run with other settings.
        StageFailed, Preempted: it stopped, here or in the process that was followed.
    """
    watcher = Watcher(named.lease, stale_seconds)
    follows = False
    while True:
        if follows and not named.lease.exists():
            _raise_for_end(named)
        holder = try_acquire(named.lease)
        if holder is not None:
            with held_lease(named.lease, holder, min(stale_seconds / 4, 5.0)):
                return _drive(named, config, drive, say)
        if not follows:
            other = read_holder(named.lease)
            where = f"process {other.pid} on {other.host}" if other else "another process"
            say(f"{named.name} is driven by {where}; following it")
            follows = True
        if watcher.is_stale() and watcher.clear():
            say("its driver fell silent; taking over")
            follows = False
            continue
        time.sleep(min(POLL_SECONDS, stale_seconds / 4))


def _drive(named: NamedRun, config: RunConfig, drive: Callable[[Run], None], say: Callable[[str], None]) -> RunFolder:
    folder, status = named.folder(), named.status()
    if folder is not None:
        _check_settings(named, config)
    if folder is not None and status == "complete":
        say(f"{named.name} is complete: {folder.scorecard}")
        return folder
    if folder is None:
        run = create_run(config)
        record: dict[str, Any] = {"run_id": run.folder.run_id, "config_digest": config_digest(config)}
        write_json(named.record, record)
    else:
        say(f"{named.name} was {status}: resuming {folder.run_id}")
        run = reopen_run(folder)
    drive(run)
    return run.folder


def _check_settings(named: NamedRun, config: RunConfig) -> None:
    if read_json(named.record)["config_digest"] != config_digest(config):
        raise ConfigError(
            f"the name {named.name!r} belongs to a run with other settings ({named.record})",
            allowed="the settings that the run began with",
            action="choose another --name, or give the old settings",
        )


def _raise_for_end(named: NamedRun) -> None:
    """The driver that was followed gave its lease back: say how it ended. A complete or new run is for `_drive`."""
    status, folder = named.status(), named.folder()
    if folder is None:
        return
    if status == "failed":
        raise StageFailed(f"the run {folder.run_id} failed while it was followed; see `hsmn-dist runs show`")
    if status == "preempted":
        raise Preempted(
            "the run that was followed was asked to leave and wrote a checkpoint",
            allowed="starting the same command again",
            action="start the same command again; it resumes",
        )
