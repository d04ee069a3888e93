"""Append-only journal of a run, and what it says about where the run stands.

Each line is one JSON object with `time`, `event` and `attempt`. A line is flushed to the disk before the call returns. A torn last
line (the machine died while writing) is passed over; a damaged line before the last is an error.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from hsmn_dist.foundation.errors import CheckpointError
from hsmn_dist.foundation.redact import redact_value

Event = dict[str, Any]


def append_event(path: Path, event: str, **fields: Any) -> None:
    """Append one line and flush it to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"time": round(time.time(), 3), "event": event, **redact_value(fields)}) + "\n"
    with path.open("ab+") as stream:
        stream.seek(0, os.SEEK_END)
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                stream.write(b"\n")
        stream.write(line.encode())
        stream.flush()
        os.fsync(stream.fileno())


def read_events(path: Path) -> list[Event]:
    """Every whole line, in order; an absent journal is empty."""
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    events: list[Event] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
            if not isinstance(event, dict) or not isinstance(event.get("event"), str):
                raise ValueError("not an event")
        except (ValueError, RecursionError) as error:
            if number >= len(lines) - 1 or _was_torn(lines, number):
                continue
            raise CheckpointError(
                f"{path}:{number}: damaged line ({error})",
                allowed="lines that this program wrote",
                action="restore the journal from a copy, or start a new run",
            ) from error
        events.append(event)
    return events


def _was_torn(lines: list[bytes], number: int) -> bool:
    """A line that a crash cut short was closed by the next writer: it does not end in a brace."""
    return not lines[number - 1].rstrip().endswith(b"}")


def last_event(events: list[Event], *names: str) -> Event | None:
    """The newest event of the given names."""
    return next((event for event in reversed(events) if event["event"] in names), None)


BEGINNINGS = ("run_started", "run_resumed")
ENDS = {"run_completed": "complete", "run_failed": "failed", "run_preempted": "preempted"}


def decisive_event(events: list[Event]) -> Event | None:
    """The event that says where the run stands: the end of its newest attempt, else that attempt's beginning.

    What a driver that was replaced wrote of its own end says nothing about the attempt that goes on.
    """
    begun = last_event(events, *BEGINNINGS)
    newest = (begun or {}).get("attempt")
    for event in reversed(events):
        if event is begun:
            return begun
        if event["event"] in ENDS and (newest is None or event.get("attempt", newest) == newest):
            return event
    return None


def run_status(events: list[Event]) -> str:
    """One word: new, running, complete, failed or preempted. A run whose process died still says `running`."""
    event = decisive_event(events)
    return "new" if event is None else ENDS.get(event["event"], "running")
