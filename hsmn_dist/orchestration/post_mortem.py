"""A run that stopped, in plain words: what failed, where, what was tried, what is safe, what to do, how to resume.

Reads the journal, the failure records, the heartbeats and checkpoints; hashes the newest checkpoint, and changes nothing.
"""

from __future__ import annotations

import platform
import time
from typing import Any

from hsmn_dist.foundation.errors import HsmnError
from hsmn_dist.foundation.files import verify_manifest
from hsmn_dist.foundation.units import format_seconds
from hsmn_dist.orchestration.failures import POLICIES, FailureKind, FailureRecord, read_failures
from hsmn_dist.orchestration.heartbeat import Beat, is_process_gone, read_beats
from hsmn_dist.orchestration.journal import BEGINNINGS, Event, decisive_event, last_event, read_events, run_status
from hsmn_dist.orchestration.run_folder import RunFolder, resume_command

SILENT_SECONDS = 60.0
BREATHLESS_SECONDS = 5.0
MANIFEST = "manifest.json"


def explain(folder: RunFolder, now: float | None = None) -> list[str]:
    """Plain sentences about the state of a run; the last one of an unfinished run is the command that takes it up."""
    events = read_events(folder.journal)
    status = run_status(events)
    if status == "complete":
        return [f"scorecard: {folder.scorecard}"]
    now = time.time() if now is None else now
    beats = read_beats(folder.path / "heartbeats")
    lines: list[str] = []
    gone = ""
    if status == "failed":
        lines += _why(folder, events, beats)
    elif status == "preempted":
        lines.append(
            f"what happened: {POLICIES[FailureKind.PREEMPTED].what} (SIGTERM or SIGUSR1), and it left with exit code 75"
        )
    elif status == "running":
        gone = _is_it_gone(events, beats, now)
        lines.append(f"what happened: {gone}" if gone else "it is running")
    lines += [_last_seen(beat, now) for beat in beats]
    lines += _tried(events)
    lines.append(_safe(folder))
    if status == "failed":
        lines.append(f"what to do: {_advice(events)}")
    elif status == "preempted" or gone:
        lines.append(f"what to do: {POLICIES[FailureKind.PREEMPTED].advice}")
    return [*lines, f"resume: {resume_command(folder)}"]


def _kind(failed: Event) -> FailureKind:
    known = {kind.value: kind for kind in FailureKind}
    return known.get(str(failed.get("kind", "")), FailureKind.UNKNOWN)


def _why(folder: RunFolder, events: list[Event], beats: list[Beat]) -> list[str]:
    failed = decisive_event(events)
    assert failed is not None
    kind = _kind(failed)
    records = read_failures(folder.path / "failures", str(failed.get("attempt", "")))
    culprit = next((record for record in records if record.kind is kind), records[0] if records else None)
    lines = [
        f"what failed: {POLICIES[kind].what} ({kind.value}): {failed['found']}",
        f"where: {_where(failed, culprit, beats)}",
    ]
    if culprit is not None and culprit.traceback:
        lines.append(f"traceback: {folder.failure(culprit.rank)}")
    others = [record for record in records if record is not culprit]
    lines += [f"beside it, rank {record.rank} on {record.host}: {POLICIES[record.kind].what}" for record in others]
    return lines


def _where(failed: Event, culprit: FailureRecord | None, beats: list[Beat]) -> str:
    rank = culprit.rank if culprit is not None else int(failed.get("rank", -1))
    beat = next((beat for beat in beats if beat.rank == rank), None)
    if rank < 0:
        return "before or between the ranks; no rank wrote why" if beats else "before any rank was started"
    host = culprit.host if culprit is not None else beat.host if beat is not None else "an unknown host"
    step = f", stage {beat.stage}, {beat.phase}, step {beat.step} of {beat.num_steps}" if beat is not None else ""
    return f"rank {rank} on {host}{step}"


def _is_it_gone(events: list[Event], beats: list[Beat], now: float) -> str:
    """Why a run without an end is thought dead; empty while it seems to run."""
    newest = max((max(beat.alive, beat.time) for beat in beats), default=0.0)
    driver = last_event(events, *BEGINNINGS) or {}
    host, pid = driver.get("host"), driver.get("pid")
    # Ranks that breathe prove life; a process number proves death only on its own host.
    if now - newest > BREATHLESS_SECONDS and isinstance(pid, int) and is_process_gone(str(host), pid):
        return f"its driver, process {pid} on {host}, is gone without a word: it was killed, or the machine was started anew"
    if now - newest <= SILENT_SECONDS or (not newest and host == platform.node()):
        return ""
    since = (
        f"no rank gave a sign of life for {format_seconds(now - newest)}"
        if newest
        else "no rank has given a sign of life"
    )
    return f"{since}: its process was killed, its machine is down, or it has only just begun"


def _last_seen(beat: Beat, now: float) -> str:
    return (
        f"rank {beat.rank} on {beat.host} was last seen in stage {beat.stage}, {beat.phase}, step {beat.step} of "
        f"{beat.num_steps}, {format_seconds(max(0.0, now - beat.time))} ago"
    )


def _tried(events: list[Event]) -> list[str]:
    """What the program did by itself, and what somebody did before."""
    lines = []
    for event in events:
        if event["event"] == "retried":
            policy = POLICIES[_kind(event)]
            lines.append(f"tried: after {policy.what}, {event['change']} ({event['number']} of {event['allowed']})")
    last_attempt = next((event.get("attempt") for event in reversed(events) if "attempt" in event), None)
    groups = {event["group"] for event in events if event.get("attempt") == last_attempt and "group" in event}
    if len(groups) > 1:
        lines.append(
            f"tried: the ranks were started {max(groups)} times in the last attempt (cluster.max_failures bounds it)"
        )
    resumed = sum(event["event"] == "run_resumed" for event in events)
    if resumed:
        lines.append(f"tried: it was resumed {resumed} times")
    return lines or ["tried: nothing was started again"]


def _safe(folder: RunFolder) -> str:
    """The newest checkpoint of the stage that is not finished whose every file has its hash."""
    stages = sorted(path for path in (folder.path / "stages").glob("[0-9]*") if not (path / "COMPLETE").is_file())
    for stage in stages[:1]:
        damaged = []
        for path in sorted(stage.glob("checkpoints/step_*"), reverse=True):
            if not (path / MANIFEST).is_file():
                continue
            try:
                verify_manifest(path, MANIFEST)
            except (OSError, HsmnError):
                damaged.append(path.name)
                continue
            passed_over = f"; damaged and passed over: {', '.join(damaged)}" if damaged else ""
            return f"safe: the checkpoint of step {int(path.name[5:])} of stage {stage.name} ({path}){passed_over}"
        what = f"no sound checkpoint (damaged: {', '.join(damaged)})" if damaged else "no checkpoint yet"
        return f"safe: every stage before {stage.name}, which has {what}"
    return "safe: every stage that has its COMPLETE manifest"


def _advice(events: list[Event]) -> str:
    failed: dict[str, Any] = decisive_event(events) or {}
    advice, action = POLICIES[_kind(failed)].advice, str(failed.get("action", ""))
    return action if advice in action or not advice else f"{advice}; {action}" if action else advice
