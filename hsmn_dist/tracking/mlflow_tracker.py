"""MLflow back end: reads the run's own files in a background thread and uploads them, exactly once.

Unusual: this tracker has no queue in memory. `JsonlTracker` writes `metrics.jsonl` and `events.jsonl`; the uploader
follows these files (docs/decisions/0070). So the training thread never waits for a server, an outage of any length loses
nothing, and `track sync` is the same code run once to the end of the files.

Exactly once: an MLflow run is found by its tags before one is made; a metric point (stage, name, step) is sent only if
the server's history of that metric has no such step; a batch that is sent again after a lost answer carries the same
timestamps, which MLflow's store takes as the same point; a run's tag counts the events that were applied.

What it costs: after a restart the history of each metric is read back once (in the thread). What it does not do: delete
points from the server, which has no way to; where a stage that was resumed or went back repeats a step that was sent, the
first value stays there, and the file has the last one.

MLflow itself is imported inside the thread: the import takes seconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from hsmn_dist.foundation.errors import DataError
from hsmn_dist.foundation.extras import require
from hsmn_dist.foundation.log import logger, warn_once
from hsmn_dist.tracking.jsonl_tracker import EVENTS_NAME, METRICS_NAME, MetricLine, parse_metric_line
from hsmn_dist.tracking.system_metrics import SystemSampler
from hsmn_dist.tracking.tracker import FinishStatus, NullTracker

RUN_ID_TAG = "hsmn_dist.run_id"
STAGE_TAG = "hsmn_dist.stage"
EVENTS_TAG = "hsmn_dist.events_applied"
_SOURCE_TAGS = {"mlflow.source.name": "hsmn-dist", "mlflow.source.type": "LOCAL"}
# Without it the UI opens the experiment in its view for chat applications.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "preempted": "KILLED"}
_MAX_METRICS, _MAX_PARAMS, _MAX_PARAM_LENGTH, _MAX_TAG_LENGTH = 1000, 100, 6000, 5000
_CONNECT_SECONDS = 3.0
_LONGEST_PAUSE_SECONDS = 30.0

_log = logger(__name__)


@dataclass(frozen=True)
class MlflowPlace:
    """Where a run's numbers go.

    Attributes:
        uri: server (http...) or database (sqlite:///...).
        experiment: its name; made if absent.
        artifact_root: folder of artifacts, used for a database without a server; "" leaves it to the server.
        run_id: the house's run id; parent and stages are found by it.
        tags: for the parent and every stage.
    """

    uri: str
    experiment: str
    artifact_root: str
    run_id: str
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def lock_path(self) -> Path | None:
        """A file to lock while runs are made in an SQLite database; None for a server."""
        prefix = "sqlite:///"
        return Path(self.uri[len(prefix) :] + ".lock") if self.uri.startswith(prefix) else None


class MlflowWriter:
    """Synchronous and idempotent writes of one run (parent and stages). Raises what MLflow raises; the caller retries."""

    def __init__(self, place: MlflowPlace) -> None:
        self.place = place
        self._client: Any = None
        self._experiment_id = ""
        self._run_ids: dict[str, str] = {}
        self._on_server: dict[tuple[str, str], tuple[set[int], int]] = {}

    def connect(self) -> None:
        """Open the store and find or make the experiment.

        Raises:
            ConnectionError: nothing answers at the server's address (asked first, because MLflow's own client would
                retry for minutes before it said so).
        """
        if self._client is not None:
            return
        _check_reachable(self.place.uri)
        mlflow = require("mlflow")
        for noisy in ("mlflow", "alembic"):
            # Both announce every table of a new database, in the middle of the run's own lines.
            logging.getLogger(noisy).setLevel(logging.WARNING)
        with _locked(self.place.lock_path):
            client = mlflow.MlflowClient(tracking_uri=self.place.uri)
            known = client.get_experiment_by_name(self.place.experiment)
            if known is None:
                root = self.place.artifact_root or None
                self._experiment_id = client.create_experiment(self.place.experiment, root, tags=_EXPERIMENT_TAGS)
            else:
                self._experiment_id = known.experiment_id
        self._client = client

    @property
    def client(self) -> Any:
        """MLflow's own client, once connected."""
        return self._client

    def forget(self) -> None:
        """Drop the connection and all that was learned over it; the next call starts afresh."""
        self._client = None
        self._run_ids.clear()
        self._on_server.clear()

    def run_of(self, stage: str) -> str:
        """MLflow's id of the parent run (stage "") or of a stage's run, found by tags or made."""
        if stage not in self._run_ids:
            with _locked(self.place.lock_path):
                found = self._find(stage)
            self._run_ids[stage] = found
        return self._run_ids[stage]

    def _find(self, stage: str) -> str:
        wanted = f"tags.`{RUN_ID_TAG}` = '{self.place.run_id}' and tags.`{STAGE_TAG}` = '{stage or 'curriculum'}'"
        found = self._client.search_runs([self._experiment_id], filter_string=wanted, order_by=["attribute.start_time"])
        if found:
            return str(found[0].info.run_id)
        tags = {**_SOURCE_TAGS, **self.place.tags, RUN_ID_TAG: self.place.run_id, STAGE_TAG: stage or "curriculum"}
        if "git_commit" in self.place.tags:
            tags["mlflow.source.git.commit"] = self.place.tags["git_commit"].split("+")[0]
        if stage:
            parent = self._run_ids.get("") or self._find("")
            self._run_ids[""] = parent
            tags["mlflow.parentRunId"] = parent
        # Stages stand below their parent in the UI, so their own name is enough, and fits into a legend.
        made = self._client.create_run(self._experiment_id, tags=tags, run_name=stage or self.place.run_id)
        return str(made.info.run_id)

    def _is_on_server(self, stage: str, name: str, step: int) -> bool:
        """Whether the server had the point when this connection first asked; each metric's history is read once."""
        key = (stage, name)
        if key not in self._on_server:
            steps = {int(point.step) for point in self._client.get_metric_history(self.run_of(stage), name)}
            self._on_server[key] = (steps, max(steps, default=-1))
        steps, last = self._on_server[key]
        if step <= last:
            return step in steps
        # Steps rise, so what lies behind is not asked for again; a run of millions of steps must not pile them up here.
        steps.clear()
        return False

    def write_lines(self, lines: list[MetricLine]) -> int:
        """Upload the points that the server does not have; returns how many were sent.

        After an error call `forget`, or a part that was sent before it would be sent again.
        """
        entities = require("mlflow.entities")
        batch: dict[str, list[Any]] = {}
        for line in lines:
            for name, value in line.values.items():
                if self._is_on_server(line.stage, name, line.step):
                    continue
                point = entities.Metric(name, value, round(line.time * 1000), line.step)
                batch.setdefault(line.stage, []).append(point)
        sent = 0
        for stage, points in batch.items():
            for start in range(0, len(points), _MAX_METRICS):
                part = points[start : start + _MAX_METRICS]
                self._send_points(stage, part)
                sent += len(part)
        return sent

    def _send_points(self, stage: str, points: list[Any]) -> None:
        """Send a batch; where the server refuses it for good, send one by one and leave out the refused ones."""
        exceptions = require("mlflow.exceptions")
        try:
            self._client.log_batch(self.run_of(stage), metrics=points)
        except exceptions.MlflowException as error:
            if not _is_permanent(error):
                raise
            if len(points) == 1:
                key = f"refused {points[0].key}"
                warn_once(_log, key, f"MLflow refuses the metric {points[0].key!r} and it is left out: {error}")
                return
            for point in points:
                self._send_points(stage, [point])

    def write_system(self, stage: str, values: Mapping[str, float], step: int) -> None:
        """Upload one sample of the machine's state; it is in no file, and lost when this fails."""
        entities = require("mlflow.entities")
        now = round(time.time() * 1000)
        points = [entities.Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self.run_of(stage), metrics=points)

    def events_applied(self, stage: str) -> int:
        """How many lines of the stage's events file the server has seen."""
        return int(self._client.get_run(self.run_of(stage)).data.tags.get(EVENTS_TAG, 0))

    def write_event(self, event: Mapping[str, Any], number: int) -> None:
        """Apply one line of `events.jsonl`; a refusal that no retry can mend is warned about and passed over."""
        exceptions = require("mlflow.exceptions")
        stage, kind = str(event["stage"]), str(event["kind"])
        run = self.run_of(stage)
        try:
            self._apply(run, kind, event)
        except (exceptions.MlflowException, OSError) as error:
            if not _is_permanent(error):
                raise
            _log.warning("MLflow refused a %s record of stage %r and it is left out: %s", kind, stage, error)
        self._client.set_tag(run, EVENTS_TAG, str(number))

    def _apply(self, run: str, kind: str, event: Mapping[str, Any]) -> None:
        entities = require("mlflow.entities")
        if kind == "start":
            self._client.update_run(run, status="RUNNING")
        elif kind == "finish":
            self._client.set_terminated(run, status=_STATUS[event["status"]])
        elif kind == "params":
            params = [entities.Param(key, text[:_MAX_PARAM_LENGTH]) for key, text in flat_params(event["values"])]
            for start in range(0, len(params), _MAX_PARAMS):
                self._client.log_batch(run, params=params[start : start + _MAX_PARAMS])
        elif kind == "tags":
            tags = [entities.RunTag(key, str(text)[:_MAX_TAG_LENGTH]) for key, text in event["values"].items()]
            self._client.log_batch(run, tags=tags)
        elif kind == "dataset":
            self._client.log_inputs(run, datasets=[_dataset_input(entities, event)])
        elif kind == "artifact":
            path = Path(event["path"])
            send = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
            send(run, str(path), event["folder"] or None)


def flat_params(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, text) pairs; lists are JSON."""
    flat: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.extend(flat_params(value, f"{prefix}{key}."))
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            flat.append((f"{prefix}{key}", text))
    return flat


def _dataset_input(entities: Any, event: Mapping[str, Any]) -> Any:
    # MLflow caps the digest at 36 characters; the whole SHA-256 stays in the source.
    source = json.dumps({"uri": event["source"], "sha256": event["digest"]})
    data = entities.Dataset(
        name=event["name"],
        digest=str(event["digest"])[:36],
        source_type="local",
        source=source,
        schema=None,
        profile=None,
    )
    return entities.DatasetInput(data, [entities.InputTag("mlflow.data.context", event["context"])])


def _is_permanent(error: Exception) -> bool:
    """Whether sending the same record again must fail again (a changed parameter, a file that is gone)."""
    code = str(getattr(error, "error_code", ""))
    return isinstance(error, FileNotFoundError) or code in ("INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS")


def _check_reachable(uri: str) -> None:
    address = urlparse(uri)
    if address.scheme in ("http", "https"):
        port = address.port or (443 if address.scheme == "https" else 80)
        with socket.create_connection((address.hostname or "", port), timeout=_CONNECT_SECONDS):
            pass


@contextlib.contextmanager
def _locked(path: Path | None) -> Iterator[None]:
    """Hold an advisory lock, so that two processes do not both migrate a new database or make the same run."""
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(stream, fcntl.LOCK_UN)


class _Tail:
    """The complete lines that were added to a file since the last look; `commit` moves on, else they come again.

    A file that was cut back behind what was read is read from its beginning again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = 0
        self._offset = 0
        self._last = b""
        self._ahead = (0, 0, b"")
        self.was_cut = False

    def read(self, max_lines: int) -> list[bytes]:
        """At most `max_lines` further lines."""
        lines: list[bytes] = []
        if self.path.is_file():
            with self.path.open("rb") as stream:
                stream.seek(self._offset - len(self._last))
                if stream.read(len(self._last)) != self._last:
                    self._offset, self.number, self._last, self.was_cut = 0, 0, b"", True
                stream.seek(self._offset)
                for raw in stream:
                    if not raw.endswith(b"\n") or len(lines) == max_lines:
                        break
                    lines.append(raw)
        last = lines[-1] if lines else self._last
        self._ahead = (self._offset + sum(map(len, lines)), self.number + len(lines), last)
        return lines

    def commit(self) -> None:
        """What was read is uploaded."""
        self._offset, self.number, self._last = self._ahead


class FolderUploader:
    """Uploads the files of one folder (of the run, or of one stage) from their beginning, as far as they go."""

    def __init__(self, writer: MlflowWriter, folder: Path, is_cancelled: Callable[[], bool] = lambda: False) -> None:
        self._writer = writer
        self._is_cancelled = is_cancelled
        self._metrics = _Tail(folder / METRICS_NAME)
        self._events = _Tail(folder / EVENTS_NAME)
        self._applied: dict[str, int] = {}
        self.sent = 0

    def upload(self) -> None:
        """Send everything that the files hold now. Raises on the first trouble; what was sent stays sent."""
        self._writer.connect()
        self._upload_events(last_ones=False)
        self._upload_metrics()
        self._upload_events(last_ones=True)

    def _upload_metrics(self) -> None:
        while raw_lines := self._metrics.read(_MAX_METRICS):
            self._check_cancelled()
            if self._metrics.was_cut:  # what the server has of it is asked for anew
                self._writer.forget()
                self._writer.connect()
                self._metrics.was_cut = False
            lines = []
            for number, raw in enumerate(raw_lines, self._metrics.number + 1):
                try:
                    lines.append(parse_metric_line(raw, self._metrics.path, number))
                except DataError as error:
                    _log.warning("%s; the line is not uploaded", error.found)
            self.sent += self._writer.write_lines(lines)
            self._metrics.commit()

    def _upload_events(self, last_ones: bool) -> None:
        """Apply events; a finish waits until the metrics before it are up, so that a finished run is whole."""
        while raw_lines := self._events.read(1):
            self._check_cancelled()
            number = self._events.number + 1
            try:
                event = json.loads(raw_lines[0])
                stage, kind = str(event["stage"]), str(event["kind"])
            except (ValueError, KeyError, TypeError) as error:
                _log.warning("%s, line %d: not an event (%r); it is not uploaded", self._events.path, number, error)
                self._events.commit()
                continue
            if kind == "finish" and not last_ones:
                return
            if stage not in self._applied:
                self._applied[stage] = self._writer.events_applied(stage)
            if number > self._applied[stage]:
                self._writer.write_event(event, number)
            self._events.commit()

    def _check_cancelled(self) -> None:
        if self._is_cancelled():
            raise ConnectionAbortedError("the upload was given up")


class MlflowTracker(NullTracker):
    """Follows a folder that a `JsonlTracker` writes; every logging call is that tracker's and does nothing here.

    Args:
        place: where to.
        folder: holds `metrics.jsonl` and `events.jsonl`.
        stage: the stage whose system metrics are sampled here.
        flush_seconds: how often the files are looked at.
        finish_timeout_seconds: longest wait in `finish`.
        system_metrics_seconds: time between samples of the machine; 0 takes none.
    """

    def __init__(
        self,
        place: MlflowPlace,
        folder: Path,
        stage: str = "",
        flush_seconds: float = 2.0,
        finish_timeout_seconds: float = 30.0,
        system_metrics_seconds: float = 10.0,
    ) -> None:
        self.place = place
        self._folder = folder
        self._stage = stage
        self._flush_seconds = flush_seconds
        self._finish_timeout_seconds = finish_timeout_seconds
        self._sampler = SystemSampler(system_metrics_seconds)
        self._writer = MlflowWriter(place)
        self._has_given_up = threading.Event()
        self._uploader = FolderUploader(self._writer, folder, self._has_given_up.is_set)
        self._failures = 0
        self._is_closing = threading.Event()
        self._is_done = threading.Event()
        self._is_whole = False
        # A daemon: a server that hangs must not keep a finished run from exiting.
        self._thread = threading.Thread(target=self._work, name="mlflow-uploader", daemon=True)
        self._thread.start()

    def finish(self, status: FinishStatus = "finished") -> None:
        """Wait until the files are uploaded, `finish_timeout_seconds` at most; call it after the JsonlTracker's."""
        if self._is_closing.is_set():
            return
        self._is_closing.set()
        self._is_done.wait(self._finish_timeout_seconds)
        if not self._is_whole:
            # A request that hangs may still come through; after it this thread must not race with a `track sync`.
            self._has_given_up.set()
            _log.warning(
                "MLflow at %s does not have all of %s yet; `hsmn-dist track sync` uploads the rest",
                self.place.uri,
                self._folder,
            )

    def _work(self) -> None:
        pause = 0.0
        deadline: float | None = None
        while True:
            was_closing = self._is_closing.wait(pause)
            if was_closing and deadline is None:
                deadline = time.monotonic() + self._finish_timeout_seconds
            # The edge of the process towards a server: nothing that happens there may end the run.
            try:
                self._uploader.upload()
                self._is_whole = was_closing
                self._failures = 0
                self._sample()
            except Exception as error:
                self._report(error)
            if was_closing and (self._is_whole or time.monotonic() >= (deadline or 0.0)):
                self._is_done.set()
                return
            pause = min(self._flush_seconds * 2**self._failures, _LONGEST_PAUSE_SECONDS)
            if was_closing:
                time.sleep(min(1.0, pause))

    def _sample(self) -> None:
        values = self._sampler.sample_if_due()
        if values:
            self._writer.write_system(self._stage, values, step=self._sampler.step)

    def _report(self, error: Exception) -> None:
        self._failures = min(self._failures + 1, 10)
        self._writer.forget()
        warn_once(
            _log,
            f"mlflow {self.place.uri} {self._folder}",
            f"MLflow at {self.place.uri} cannot be used now ({error}); the run goes on, its numbers are in "
            f"{self._folder / METRICS_NAME}, and they are uploaded when it answers again",
        )


def sync_folder(place: MlflowPlace, run_folder: Path) -> int:
    """Upload a run's files: the run's own and every stage's. Returns the number of metric points that were sent.

    Points that are on the server already are not sent again, so this can be repeated at will.
    """
    writer = MlflowWriter(place)
    writer.connect()
    sent = 0
    for folder in [run_folder, *sorted(run_folder.glob("stages/*"))]:
        if (folder / METRICS_NAME).is_file() or (folder / EVENTS_NAME).is_file():
            uploader = FolderUploader(writer, folder)
            uploader.upload()
            sent += uploader.sent
    return sent
