"""One small file per rank that says where it is: read by the live view, and by the watch that finds a hung rank.

Written without a flush to the disk: it is a sign of life, not a record. Unusual: it has two times. `time` is that of the training's
last progress; `alive` is kept fresh by a thread of the rank. Where all ranks stand still because one of them does, the one that no
longer breathes (a stopped process, a dead machine) or is the furthest behind is the culprit, and the others wait for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MIN_INTERVAL_SECONDS = 0.25
BREATH_SECONDS = 1.0


@dataclass(frozen=True)
class Beat:
    """Where a rank is. `phase` is join, prepare, baseline, train, fisher, export, evaluate or done.

    `time` is that of the last progress, `alive` that of the last sign of life of process `pid`.
    """

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
    alive: float = 0.0
    pid: int = 0


class Heart:
    """Writes this rank's beats, at most a few a second; `start` adds a thread that writes while the training waits."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = folder / f"rank_{rank:05d}.json"
        self._rank = rank
        self._written = 0.0
        self._progress = time.time()
        self._fields: dict[str, Any] = {"stage": "", "stage_index": 0, "phase": "", "step": 0, "num_steps": 0}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)

    def start(self) -> Heart:
        """Breathe in a thread from now on, until `stop` or the end of the process."""
        threading.Thread(target=self._breathe, daemon=True, name="heart").start()
        return self

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()

    def beat(self, force: bool = False, **fields: Any) -> None:
        """Note progress and new fields; a change of phase is written at once."""
        with self._lock:
            changed = force or fields.get("phase", self._fields["phase"]) != self._fields["phase"]
            self._fields.update(fields)
            self._progress = time.time()
            if changed or self._progress - self._written >= MIN_INTERVAL_SECONDS:
                self._write(self._progress)

    def _breathe(self) -> None:
        while not self._ended.wait(BREATH_SECONDS):
            with self._lock:
                self._write(time.time())

    def _write(self, now: float) -> None:
        self._written = now
        beat = Beat(
            rank=self._rank,
            host=platform.node(),
            loss=self._fields.get("loss"),
            tokens_per_second=self._fields.get("tokens_per_second"),
            time=self._progress,
            alive=now,
            pid=os.getpid(),
            **{name: self._fields[name] for name in ("stage", "stage_index", "phase", "step", "num_steps")},
        )
        aside = self._path.with_suffix(".tmp")
        with contextlib.suppress(OSError):  # a full disk is told by the training, not by its heart
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


def has_ended(beat: Beat) -> bool:
    """Whether the process that wrote a beat is known to be gone: it is not silent but dead, which is its launcher's business."""
    if not beat.pid or beat.host != platform.node():
        return False
    try:
        os.kill(beat.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def silent_rank(beats: list[Beat], stall_seconds: float, now: float) -> Beat | None:
    """The rank to blame when one has made no progress for longer than `stall_seconds`.

    Among the ranks that stand still: one that does not even breathe, else the one furthest behind, else the longest silent.
    """
    stalled = [beat for beat in beats if beat.phase != "done" and now - beat.time > stall_seconds]

    def blame(beat: Beat) -> tuple[bool, int, int, float]:
        is_breathing = now - beat.alive <= stall_seconds / 2
        return is_breathing, beat.stage_index, beat.step, beat.time

    return min(stalled, key=blame) if stalled else None
