"""JsonlTracker: append-only `metrics.jsonl` (numbers) and `events.jsonl` (everything else), in the run folder.

Unusual: these files are the queue of every remote tracker (docs/decisions/0070). The training thread appends one line
and goes on; an uploader reads the files at its own pace, so an outage of any length loses nothing and takes no memory.

A point is named by (stage, metric, step) and exists once: a stage that is resumed, or goes back to a checkpoint, cuts the
file back to the steps that the checkpoint holds, and a repeated step is refused. Line format of `metrics.jsonl`:
`{"id": 12, "time": 1760000000.123, "stage": "00_math", "step": 5, "values": {"train/loss_nats": 1.25}}`; values that
JSON cannot hold are the strings "nan", "inf" and "-inf". Ids rise and are never used twice in one file.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsmn_dist.foundation.errors import DataError
from hsmn_dist.foundation.files import write_text
from hsmn_dist.foundation.log import logger, warn_once
from hsmn_dist.foundation.redact import redact_value
from hsmn_dist.tracking.tracker import FinishStatus

METRICS_NAME = "metrics.jsonl"
EVENTS_NAME = "events.jsonl"

_log = logger(__name__)


@dataclass(frozen=True)
class MetricLine:
    """One line of `metrics.jsonl`: the values of one step. `time` is in seconds since 1970 (UTC)."""

    id: int
    time: float
    stage: str
    step: int
    values: dict[str, float]

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> MetricLine:
        """Build from the decoded JSON of a line; KeyError, TypeError or ValueError where it is something else."""
        values = {str(name): float(value) for name, value in record["values"].items()}
        return MetricLine(int(record["id"]), float(record["time"]), str(record["stage"]), int(record["step"]), values)

    def to_json(self) -> dict[str, Any]:
        """The JSON form of the line."""
        values = {name: value if math.isfinite(value) else str(value) for name, value in self.values.items()}
        return {"id": self.id, "time": self.time, "stage": self.stage, "step": self.step, "values": values}


def read_metric_lines(path: Path) -> Iterator[MetricLine]:
    """The complete lines of a metrics file, in order; an absent file has none.

    A last line without its newline is a write that was cut off (or is still going on) and is left out. A damaged line (a
    disk that was full, an editor) is passed over with a warning: numbers for people must not fail a run.
    """
    if not path.is_file():
        return
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            if not raw.endswith(b"\n"):
                return
            try:
                yield parse_metric_line(raw, path, number)
            except DataError as error:
                warn_once(_log, f"damaged {path}:{number}", f"{error.found}; the line is passed over")


def parse_metric_line(raw: bytes, path: Path, number: int) -> MetricLine:
    """Decode one line, or a `DataError` that names file and line."""
    try:
        return MetricLine.from_json(json.loads(raw))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}, line {number}: not a metric line ({error!r})",
            allowed='lines such as {"id": 0, "time": 1.0, "stage": "00_a", "step": 0, "values": {"train/loss_nats": 1.0}}',
            action="remove the line, or the whole file if nothing in it can be trusted",
        ) from error


def read_series(path: Path, stage: str | None = None) -> dict[str, list[tuple[int, float]]]:
    """Metric name -> (step, value) points in file order, of one stage or of all."""
    series: dict[str, list[tuple[int, float]]] = {}
    for line in read_metric_lines(path):
        if stage is None or line.stage == stage:
            for name, value in line.values.items():
                series.setdefault(name, []).append((line.step, value))
    return series


class JsonlTracker:
    """Writes `metrics.jsonl` and `events.jsonl` in `folder`.

    Args:
        folder: made if absent.
        stage: label of the lines, such as "00_math"; "" for the curriculum as a whole.
        first_step: the first step number that will be logged from here on. Points of this stage at or beyond it are
            cut from the file: they were written after the checkpoint that the stage resumes from. None cuts nothing.
        clock: gives the time in seconds since 1970.
    """

    def __init__(
        self,
        folder: Path,
        stage: str = "",
        first_step: int | None = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.metrics_path = folder / METRICS_NAME
        self.events_path = folder / EVENTS_NAME
        self.stage = stage
        self._clock = clock
        self._is_finished = False
        folder.mkdir(parents=True, exist_ok=True)
        self._next_id, self._last_step = _cut_back(self.metrics_path, stage, first_step)
        _drop_partial_line(self.events_path)
        self._metrics = _LineFile(self.metrics_path)
        self._events = _LineFile(self.events_path)
        self._event("start")

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Append one line. Steps of one name must rise; a point that exists already is left out, said once a name."""
        fresh = {}
        for name, value in values.items():
            if step <= self._last_step.get(name, -1):
                key = f"{self.metrics_path}:{name}"
                warn_once(
                    _log, key, f"{name} at step {step} exists already in {self.metrics_path}; the first one stays"
                )
                continue
            fresh[name] = float(value)
            self._last_step[name] = step
        if fresh and not self._is_finished:
            line = MetricLine(self._next_id, round(self._clock(), 3), self.stage, step, fresh)
            self._next_id += 1
            self._metrics.append(line.to_json())

    def rewind(self, step: int) -> None:
        """Cut this stage's points at `step` and beyond from the file, durably; they are logged again as they come."""
        if self._is_finished:
            return
        self._metrics.close()
        try:
            next_id, self._last_step = _cut_back(self.metrics_path, self.stage, step)
            self._next_id = max(self._next_id, next_id)
        finally:
            self._metrics = _LineFile(self.metrics_path)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """See Tracker."""
        self._event("params", values=dict(params))

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """See Tracker."""
        self._event("artifact", path=str(Path(path).resolve()), folder=folder)

    def log_figure(self, path: Path) -> None:
        """See Tracker."""
        self._event("artifact", path=str(Path(path).resolve()), folder="figures")

    def log_dataset(self, name: str, digest: str, source: str, context: str = "training") -> None:
        """See Tracker."""
        self._event("dataset", name=name, digest=digest, source=source, context=context)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """See Tracker."""
        self._event("tags", values={key: str(value) for key, value in tags.items()})

    def finish(self, status: FinishStatus = "finished") -> None:
        """Write the status, push both files to the disk, and close them."""
        if self._is_finished:
            return
        self._event("finish", status=status)
        self._is_finished = True
        for file in (self._metrics, self._events):
            file.close()

    def _event(self, kind: str, **fields: Any) -> None:
        if not self._is_finished:
            # Here, where every tracker's parameters and tags pass, secrets are hidden.
            kept = redact_value(fields)
            self._events.append({"time": round(self._clock(), 3), "stage": self.stage, "kind": kind, **kept})


class _LineFile:
    """Appends whole lines: one write call each, so that a reader sees whole lines and a kill leaves at most one torn line."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._is_torn = False

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line; after a line that was cut by a full disk, on a line of its own."""
        line = (json.dumps(record, separators=(",", ":"), default=str) + "\n").encode()
        if self._is_torn:
            line = b"\n" + line
        self._is_torn = True
        written = os.write(self._descriptor, line)
        self._is_torn = written != len(line)

    def close(self) -> None:
        """Push everything to the disk."""
        os.fsync(self._descriptor)
        os.close(self._descriptor)


def _drop_partial_line(path: Path) -> None:
    if path.is_file():
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            write_text(path, whole.decode())


def _cut_back(path: Path, stage: str, first_step: int | None) -> tuple[int, dict[str, int]]:
    """Rewrite the file without this stage's points at or beyond `first_step`.

    Returns:
        The next free id, and the last step of every metric name of this stage.
    """
    _drop_partial_line(path)
    kept: list[str] = []
    last_step: dict[str, int] = {}
    next_id, dropped = 0, 0
    for line in read_metric_lines(path):
        next_id = max(next_id, line.id + 1)
        if line.stage == stage and first_step is not None and line.step >= first_step:
            dropped += 1
            continue
        kept.append(json.dumps(line.to_json(), separators=(",", ":")))
        if line.stage == stage:
            for name in line.values:
                last_step[name] = max(last_step.get(name, -1), line.step)
    if dropped:
        write_text(path, "".join(f"{text}\n" for text in kept))
        _log.info("%s: cut %d lines at or beyond step %s of stage %r", path, dropped, first_step, stage)
    return next_id, last_step
