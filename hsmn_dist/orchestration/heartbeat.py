"""One small file per rank that says where it is: read by the live view, and by the watch that finds a hung rank.

Written without a flush to the disk: it is a sign of life, not a record.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MIN_INTERVAL_SECONDS = 0.25


@dataclass(frozen=True)
class Beat:
    """Where a rank is. `phase` is prepare, baseline, train, fisher, export, evaluate or done."""

    rank: int
    host: str
    stage: str
    stage_index: int
    phase: str
    step: int
    num_steps: int
    loss: float | None
    tokens_per_second: float | None
    time: float


class Heart:
    """Writes this rank's beats, at most a few a second."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = folder / f"rank_{rank:05d}.json"
        self._rank = rank
        self._last = 0.0
        self._fields: dict[str, Any] = {"stage": "", "stage_index": 0, "phase": "", "step": 0, "num_steps": 0}
        folder.mkdir(parents=True, exist_ok=True)

    def beat(self, force: bool = False, **fields: Any) -> None:
        """Note new fields; a change of phase is written at once."""
        changed = force or fields.get("phase", self._fields["phase"]) != self._fields["phase"]
        self._fields.update(fields)
        now = time.time()
        if not changed and now - self._last < MIN_INTERVAL_SECONDS:
            return
        self._last = now
        beat = Beat(
            rank=self._rank,
            host=platform.node(),
            loss=self._fields.get("loss"),
            tokens_per_second=self._fields.get("tokens_per_second"),
            time=now,
            **{name: self._fields[name] for name in ("stage", "stage_index", "phase", "step", "num_steps")},
        )
        aside = self._path.with_suffix(".tmp")
        aside.write_text(json.dumps(asdict(beat)))
        aside.replace(self._path)


def read_beats(folder: Path) -> list[Beat]:
    """The last beat of every rank, lowest rank first."""
    beats = []
    for path in sorted(folder.glob("rank_*.json")):
        try:
            beats.append(Beat(**json.loads(path.read_text())))
        except (OSError, ValueError, TypeError):
            continue  # replaced or removed while it was read
    return beats


def silent_rank(beats: list[Beat], stall_seconds: float, now: float) -> Beat | None:
    """The rank that has been silent longest, when that is longer than `stall_seconds`."""
    stalled = [beat for beat in beats if beat.phase != "done" and now - beat.time > stall_seconds]
    return min(stalled, key=lambda beat: beat.time) if stalled else None
