"""run_curriculum: prepare, launch every pending stage, score, write the scorecard. Knows a launcher, not Ray."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from hsmn_dist.config.load import config_digest, run_config_from_mapping, write_resolved
from hsmn_dist.config.run import RunConfig
from hsmn_dist.data.shards.remote import folder_name, is_url
from hsmn_dist.foundation.errors import CheckpointError, ConfigError, HsmnError, Preempted, StageFailed
from hsmn_dist.foundation.files import sha256_of_file, write_json, write_text
from hsmn_dist.foundation.log import logger
from hsmn_dist.foundation.provenance import provenance
from hsmn_dist.orchestration.adjustments import shrink_micro_batch
from hsmn_dist.orchestration.attempt import new_attempt
from hsmn_dist.orchestration.failures import POLICIES, FailureKind, classify
from hsmn_dist.orchestration.heartbeat import has_ended, read_beats, silent_rank
from hsmn_dist.orchestration.journal import append_event, read_events, run_status
from hsmn_dist.orchestration.launcher import StageLauncher
from hsmn_dist.orchestration.run_folder import RunFolder, new_run_folder
from hsmn_dist.orchestration.stage import pending_specs

log = logger(__name__)

WATCH_SECONDS = 1.0


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
    append_event(folder.journal, "run_started", attempt=attempt, config_sha256=sha256_of_file(folder.config))
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
    append_event(folder.journal, "run_resumed", attempt=attempt)
    return Run(config, folder, attempt)


def load_stored_config(folder: RunFolder) -> RunConfig:
    """The resolved configuration of a run."""
    return run_config_from_mapping(yaml.safe_load(folder.config.read_text(encoding="utf-8")))


def run_curriculum(
    run: Run, launcher: StageLauncher, prepare: Callable[[Run], None], finish: Callable[[Run], None]
) -> None:
    """`prepare` the data, run what is pending of a curriculum, then `finish` (scorecard and figures).

    Raises:
        Preempted: the run was asked to leave; a checkpoint was written.
        StageFailed, HsmnError: it could not go on; the journal says why.
    """
    folder = run.folder
    try:
        prepare(run)
        with _stop_on_signals(folder, launcher, run.config.cluster.grace_seconds):
            _launch_until_done(run, launcher)
        finish(run)
    except Preempted:
        _note_end(run, "run_preempted")
        raise
    except HsmnError as error:
        kind, rank = classify(error).value, getattr(error, "rank", -1)
        _note_end(run, "run_failed", kind=kind, rank=rank, found=error.found, action=error.action)
        raise
    finally:
        launcher.stop()
    append_event(folder.journal, "run_completed", attempt=run.attempt)


def _note_end(run: Run, event: str, **fields: Any) -> None:
    """A last line of the journal. A full disk is no reason to hide the error that is on its way."""
    try:
        append_event(run.folder.journal, event, attempt=run.attempt, **fields)
    except OSError as error:
        log.warning("%s: the journal could not be written: %s", run.folder.journal, error)


def _launch_until_done(run: Run, launcher: StageLauncher) -> None:
    """Launch what is pending; after a failure again, as often as the table of failures allows for its kind."""
    spent: Counter[FailureKind] = Counter()
    while specs := pending_specs(run.config, run.folder, run.attempt):
        try:
            with _watch(run, launcher) as hung:
                try:
                    launcher.launch(specs)
                except HsmnError:
                    if hung:
                        raise hung[0] from None
                    raise
        except StageFailed as error:
            kind = classify(error)
            change = _change_for_retry(run, kind) if spent[kind] < POLICIES[kind].retries else None
            if change is None or run.folder.stop_request.exists():
                raise
            spent[kind] += 1
            append_event(
                run.folder.journal,
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


def _change_for_retry(run: Run, kind: FailureKind) -> str | None:
    """Do what the table says before a retry; in words. None when it cannot be done."""
    if not POLICIES[kind].halves_micro_batch:
        return "started again from the last checkpoint"
    size = shrink_micro_batch(run.config, run.folder)
    return (
        None if size is None else f"started again with training.micro_batch_examples {size}, the global batch as it was"
    )


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


@contextmanager
def _stop_on_signals(folder: RunFolder, launcher: StageLauncher, grace_seconds: float) -> Iterator[None]:
    """TERM and USR1 ask the ranks to checkpoint and leave; after the grace time the launcher is stopped. Idempotent."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    timers: list[threading.Timer] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if not timers:
            write_text(folder.stop_request, f"signal {number}\n")
            timer = threading.Timer(grace_seconds, launcher.stop)
            timer.daemon = True
            timers.append(timer)
            timer.start()

    names = (signal.SIGTERM, signal.SIGUSR1)
    before = {name: signal.signal(name, ask) for name in names}
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
        for name, handler in before.items():
            signal.signal(name, handler)


@contextmanager
def _watch(run: Run, launcher: StageLauncher) -> Iterator[list[StageFailed]]:
    """Look at the heartbeats; a rank that falls silent ends the launch and is named."""
    hung: list[StageFailed] = []
    done = threading.Event()

    def look() -> None:
        while not done.wait(WATCH_SECONDS):
            beats = [beat for beat in read_beats(run.folder.path / "heartbeats") if not has_ended(beat)]
            beat = silent_rank(beats, run.config.cluster.stall_seconds, time.time())
            if beat is not None:
                hung.append(
                    StageFailed(
                        f"rank {beat.rank} on {beat.host} has been silent for {time.time() - beat.time:.0f} s "
                        f"(stage {beat.stage}, {beat.phase}, step {beat.step})",
                        allowed=f"a sign of life every {run.config.cluster.stall_seconds:g} s (cluster.stall_seconds)",
                        kind="hung",
                        rank=beat.rank,
                    )
                )
                launcher.stop()
                return

    thread = threading.Thread(target=look, daemon=True, name="heartbeat-watch")
    thread.start()
    try:
        yield hung
    finally:
        done.set()
        thread.join(timeout=5)
