"""run_curriculum: prepare, launch every pending stage, score, write the scorecard. Knows a launcher, not Ray."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hsmn_dist.config.load import config_digest, run_config_from_mapping, write_resolved
from hsmn_dist.config.run import RunConfig
from hsmn_dist.data.shards.remote import folder_name, is_url
from hsmn_dist.foundation.errors import CheckpointError, ConfigError, HsmnError, Preempted, StageFailed
from hsmn_dist.foundation.files import sha256_of_file, write_json
from hsmn_dist.foundation.log import logger
from hsmn_dist.foundation.provenance import provenance
from hsmn_dist.orchestration.adjustments import shrink_micro_batch
from hsmn_dist.orchestration.attempt import check_attempt, new_attempt
from hsmn_dist.orchestration.failures import POLICIES, FailureKind, classify
from hsmn_dist.orchestration.hang_watch import hang_watch
from hsmn_dist.orchestration.heartbeat import read_beats
from hsmn_dist.orchestration.journal import append_event, read_events, run_status
from hsmn_dist.orchestration.launcher import StageLauncher, preempted
from hsmn_dist.orchestration.run_folder import RunFolder, new_run_folder, resume_command
from hsmn_dist.orchestration.stage import StageSpec, pending_specs
from hsmn_dist.orchestration.stop_signals import StopAsked, StopSignals

log = logger(__name__)

ENDED_FROM_OUTSIDE = (FailureKind.WORKER_LOST, FailureKind.HUNG)
"""How ranks end that are killed when the grace time is over."""


@dataclass(frozen=True)
class Run:
    """A run on disk: its settings, its folder, and the token of this attempt."""

    config: RunConfig
    folder: RunFolder
    attempt: str


def create_run(config: RunConfig) -> Run:
    """Make the run folder with the resolved configuration and its provenance."""
    folder = new_run_folder(Path(config.run_root), config.name)
    folder.path.mkdir(parents=True)
    write_json(folder.provenance, provenance(config_digest(config)))
    attempt = new_attempt(folder)
    write_resolved(config, folder.config)  # last: a run exists when its configuration does
    digest = sha256_of_file(folder.config)
    append_event(folder.journal, "run_started", attempt=attempt, config_sha256=digest, **_this_driver())
    return Run(config, folder, attempt)


def reopen_run(folder: RunFolder) -> Run:
    """Take up an earlier run under a new attempt token.

    Raises:
        ConfigError: the run is complete already.
        CheckpointError: its stored configuration was changed since.
    """
    config = load_stored_config(folder)
    events = read_events(folder.journal)
    started = next((event for event in events if event["event"] == "run_started"), None)
    if started and started.get("config_sha256") != sha256_of_file(folder.config):
        raise CheckpointError(
            f"{folder.config}: its SHA-256 is not the one in the journal; the configuration was changed after the run began",
            allowed="the configuration that the run started with",
            action="restore it, or start a new run with the changed one",
        )
    if run_status(events) == "complete":
        raise ConfigError(
            f"run {folder.run_id} is complete",
            allowed="resuming a run that stopped early",
            action=f"see `hsmn-dist scorecard {folder.run_id}`",
        )
    attempt = new_attempt(folder)
    append_event(folder.journal, "run_resumed", attempt=attempt, **_this_driver())
    return Run(config, folder, attempt)


def _this_driver() -> dict[str, Any]:
    """Whom `runs show` asks for when no rank gives a sign of life."""
    return {"host": platform.node(), "pid": os.getpid()}


def load_stored_config(folder: RunFolder) -> RunConfig:
    """The resolved configuration of a run."""
    return run_config_from_mapping(yaml.safe_load(folder.config.read_text(encoding="utf-8")))


def run_curriculum(
    run: Run, launcher: StageLauncher, prepare: Callable[[Run], None], finish: Callable[[Run], None]
) -> None:
    """`prepare` the data, run what is pending of a curriculum, then `finish` (scorecard and figures).

    Raises:
        Preempted: the run was asked to leave; it goes on from its last checkpoint.
        StageFailed, HsmnError: it could not go on; the journal says why.
    """
    folder = run.folder
    check_attempt(folder, run.attempt)
    # Once, and before the handlers: a request that comes after them is meant for this driver.
    folder.stop_request.unlink(missing_ok=True)
    with StopSignals(folder, run.attempt, launcher.stop, run.config.cluster.grace_seconds) as signals:
        try:
            try:
                prepare(run)
                _launch_until_done(run, launcher, signals)
                check_attempt(folder, run.attempt)
                finish(run)
            finally:
                signals.hold()
            check_attempt(folder, run.attempt)
            append_event(folder.journal, "run_completed", attempt=run.attempt)
        except (StopAsked, Preempted, KeyboardInterrupt) as error:
            _note_end(run, "run_preempted")
            if isinstance(error, StopAsked):
                raise preempted(folder) from None
            raise
        except Exception as error:
            failure = _explained(error, folder)
            kind, rank = classify(failure).value, getattr(failure, "rank", -1)
            found, action = _found_and_action(failure)
            _note_end(run, "run_failed", kind=kind, rank=rank, found=found, action=action)
            if failure is error:
                raise
            raise failure from error
        finally:
            launcher.stop()


def _explained(error: Exception, folder: RunFolder) -> Exception:
    """An error of the system that the table knows (a full disk, no memory) in three parts; any other one as it is."""
    kind = classify(error)
    if isinstance(error, HsmnError) or kind is FailureKind.UNKNOWN:
        return error
    return StageFailed(
        f"the driver met: {error or repr(error)}",
        action=f"{POLICIES[kind].advice}; resume with `{resume_command(folder)}`",
        kind=kind.value,
    )


def _found_and_action(error: Exception) -> tuple[str, str]:
    if isinstance(error, HsmnError):
        return error.found, error.action
    return f"the driver met {error!r}", "this is a defect of hsmn-dist: report the lines that it printed"


def _note_end(run: Run, event: str, **fields: Any) -> None:
    """A last line of the journal. Neither a full disk nor a successor is a reason to hide the error that is on its way.

    Of a driver that was replaced nothing is written: the journal tells of the attempt that goes on.
    """
    try:
        check_attempt(run.folder, run.attempt)
        append_event(run.folder.journal, event, attempt=run.attempt, **fields)
    except OSError as error:
        log.warning("%s: the journal could not be written: %s", run.folder.journal, error)
    except HsmnError as error:
        log.warning("%s is not noted: %s", event, error.found)


def _launch_until_done(run: Run, launcher: StageLauncher, signals: StopSignals) -> None:
    """Launch what is pending; after a failure again, as often as the table of failures allows for its kind."""
    folder, spent = run.folder, Counter[FailureKind]()
    while specs := pending_specs(run.config, folder, run.attempt):
        _leave_if_asked(folder)
        check_attempt(folder, run.attempt)
        try:
            with signals.held():
                _launch(run, launcher, specs)
        except StageFailed as error:
            check_attempt(folder, run.attempt)
            kind = classify(error)
            change = _change_for_retry(run, kind) if spent[kind] < POLICIES[kind].retries else None
            if change is not None or kind in ENDED_FROM_OUTSIDE:
                _leave_if_asked(folder)
            if change is None:
                raise
            spent[kind] += 1
            append_event(
                folder.journal,
                "retried",
                attempt=run.attempt,
                kind=kind.value,
                rank=error.rank,
                found=error.found,
                change=change,
                number=spent[kind],
                allowed=POLICIES[kind].retries,
            )
            log.warning("%s; %s (retry %d of %d)", error.found, change, spent[kind], POLICIES[kind].retries)
    _leave_if_asked(folder)


def _launch(run: Run, launcher: StageLauncher, specs: Sequence[StageSpec]) -> None:
    """One launch under the watch, whose verdict explains what the launcher saw of it."""
    with hang_watch(run.folder, run.attempt, run.config.cluster.stall_seconds, launcher.stop) as hung:
        try:
            launcher.launch(specs)
        except Exception:
            if hung:
                raise hung[0] from None
            raise


def _leave_if_asked(folder: RunFolder) -> None:
    if folder.stop_request.exists():
        raise preempted(folder)


def _change_for_retry(run: Run, kind: FailureKind) -> str | None:
    """Do what the table says before a retry; in words. None when it cannot be done."""
    if not POLICIES[kind].halves_micro_batch:
        return "started again from the last checkpoint"
    is_fisher = any(beat.phase == "fisher" for beat in read_beats(run.folder.path / "heartbeats"))
    return shrink_micro_batch(run.config, run.folder, is_fisher)


def record_prepared(folder: RunFolder, tokenizer: Path, folders: dict[str, Path]) -> None:
    """Note where this run's tokenizer and shards are."""
    write_json(
        folder.prepared,
        {
            "tokenizer": str(tokenizer.resolve()),
            "folders": {
                name: folder_name(path) if is_url(path) else str(path.resolve()) for name, path in folders.items()
            },
        },
    )
