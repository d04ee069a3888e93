"""One small file per rank that says where it is: read by the live view, and by the watch that finds a hung rank.

Written without a flush to the disk: it is a sign of life, not a record. Unusual: it has two times. `time` is that of the training's
last progress; `alive` is kept fresh by a thread of the rank. Where all ranks stand still because one of them does, the one that no
longer breathes (a stopped process, a dead machine) or is the furthest behind is the culprit, and the others wait for it. A rank that
knows that it waits for the others says so, and is not blamed while one of them works. Files of ranks that are gone stay behind (nobody
can ask another machine's processes): each beat names its attempt, group and number of ranks, and those of earlier groups do not count.
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
JOINING = -1


@dataclass(frozen=True)
class Beat:
    """Where a rank is. `phase` is join, prepare, baseline, train, fisher, export, evaluate or done.

    `time` is that of the last progress, `alive` that of the last sign of life of process `pid`, `begun` that of its first one.
    `group` is JOINING until the ranks have met. `waits` says that the rank stands in a collective after its own part of the work.
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
    begun: float = 0.0
    attempt: str = ""
    group: int = JOINING
    world_size: int = 0
    waits: bool = False


class Heart:
    """Writes this rank's beats, at most a few a second; `start` adds a thread that writes while the training waits."""

    def __init__(self, folder: Path, rank: int, world_size: int = 0, attempt: str = "") -> None:
        self._path = folder / f"rank_{rank:05d}.json"
        self._rank = rank
        self._group: dict[str, Any] = {
            "attempt": attempt,
            "group": JOINING,
            "world_size": world_size,
            "begun": time.time(),
        }
        self._written = 0.0
        self._progress = time.time()
        place: dict[str, Any] = {"stage": "", "stage_index": 0, "phase": "", "step": 0, "num_steps": 0}
        self._fields = {**place, "waits": False}
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

    def meet(self, group: int) -> None:
        """Note the group that this rank belongs to, once the ranks have met."""
        self._group["group"] = group
        self.beat(force=True)

    def wait(self) -> None:
        """Note that this rank has done its part and waits for the others, until its next beat."""
        self.beat(force=True, waits=True)

    def beat(self, force: bool = False, **fields: Any) -> None:
        """Note progress and new fields; a change of phase is written at once."""
        with self._lock:
            before = self._fields
            self._fields = {**before, "waits": False, **fields}
            changed = force or any(self._fields[name] != before[name] for name in ("phase", "waits"))
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
            **self._group,
            **{name: self._fields[name] for name in ("stage", "stage_index", "phase", "step", "num_steps", "waits")},
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
    return bool(beat.pid) and is_process_gone(beat.host, beat.pid)


def is_process_gone(host: str, pid: int) -> bool:
    """Whether there is no such process on this host; of other hosts nothing is known."""
    if host != platform.node():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return False


def of_newest_group(beats: list[Beat], attempt: str) -> list[Beat]:
    """The beats of the group that an attempt started last; those that its predecessors left behind are dropped.

    Unusual: while new ranks join, they have no number yet. The rank that was started last says which of the two it is, and how many
    ranks there are: after a shrink nobody replaces the files of the higher ones.
    """
    own = [beat for beat in beats if beat.attempt == attempt]
    if not own:
        return []
    newest = max(own, key=lambda beat: beat.begun)
    return [beat for beat in own if beat.group in (newest.group, JOINING) and beat.rank < newest.world_size]


def silent_rank(beats: list[Beat], stall_seconds: float, now: float) -> Beat | None:
    """The rank to blame when one has made no progress for longer than `stall_seconds`.

    Among the ranks that stand still: one that does not even breathe, else the one furthest behind, else the longest silent. A rank that
    waits for the others stands still by right, unless all of them do.
    """

    def is_breathing(beat: Beat) -> bool:
        return now - beat.alive <= stall_seconds / 2

    present = [beat for beat in beats if beat.phase != "done"]
    still = [beat for beat in present if now - beat.time > stall_seconds]
    stalled = [beat for beat in still if not (beat.waits and is_breathing(beat))]
    if not stalled and len(still) == len(present):
        stalled = still

    def blame(beat: Beat) -> tuple[bool, int, int, float]:
        return is_breathing(beat), beat.stage_index, beat.step, beat.time

    return min(stalled, key=blame) if stalled else None
