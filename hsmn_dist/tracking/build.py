"""build_tracker: the files of the run folder, and MLflow beside them. `sync_run`: upload those files later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hsmn_dist.config.tracking import TrackingConfig
from hsmn_dist.foundation.errors import ConfigError, HsmnError
from hsmn_dist.foundation.files import read_json, write_json
from hsmn_dist.foundation.log import logger, warn_once
from hsmn_dist.foundation.redact import redact_value
from hsmn_dist.tracking.jsonl_tracker import EVENTS_NAME, METRICS_NAME, JsonlTracker
from hsmn_dist.tracking.tracker import CompositeTracker, NullTracker, Tracker

RECORD_NAME = "tracking.json"

_log = logger(__name__)


@dataclass(frozen=True)
class TrackedRun:
    """What the trackers have to know of a run.

    Attributes:
        run_root: folder of all runs; holds the default database.
        run_folder: folder of this run.
        run_id: its id; unique among all runs of the experiment.
        stage: such as "00_math", which is also the folder's name under `stages/`; "" for the curriculum as a whole.
        first_step: the first step number that will be logged; what the files hold beyond it is cut (see JsonlTracker).
            None keeps what is there, as the curriculum's own run does.
        tags: git commit, cluster, model family and the like.
    """

    run_root: Path
    run_folder: Path
    run_id: str
    stage: str = ""
    first_step: int | None = None
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where this stage's (or the run's) files are."""
        return self.run_folder / "stages" / self.stage if self.stage else self.run_folder


def default_uri(run_root: Path) -> str:
    """The database used where the configuration names none."""
    return f"sqlite:///{run_root.resolve() / 'mlflow.db'}"


def artifact_root(run_root: Path, uri: str) -> str:
    """Folder of artifacts beside a database; "" for a server, which keeps its own."""
    return "" if uri.startswith("http") else (run_root.resolve() / "mlartifacts").as_uri()


def build_tracker(config: TrackingConfig, run: TrackedRun, rank: int = 0) -> Tracker:
    """The tracker of one process: `NullTracker` off rank 0, else the files and, if asked for, MLflow."""
    if rank != 0:
        return NullTracker()
    uri = config.uri or default_uri(run.run_root)
    tags = redact_value({**config.tags, **run.tags})
    record = {"run_id": run.run_id, "uri": uri, "experiment": config.experiment, "tags": tags}
    if config.backend == "mlflow" and not run.stage:
        write_json(run.run_folder / RECORD_NAME, redact_value(record))
    files = JsonlTracker(run.folder, run.stage, run.first_step)
    if config.backend == "none":
        # Within a composite a full disk is a warning, as it is beside MLflow.
        return CompositeTracker([files])
    try:
        from hsmn_dist.tracking.mlflow_tracker import MlflowPlace, MlflowTracker
    except ImportError as error:  # pragma: no cover - only on a system without fcntl
        warn_once(_log, "mlflow import", f"MLflow cannot be used here ({error}); metrics.jsonl is written")
        return CompositeTracker([files])
    place = MlflowPlace(uri, config.experiment, artifact_root(run.run_root, uri), run.run_id, tags)
    remote = MlflowTracker(
        place,
        run.folder,
        run.stage,
        flush_seconds=config.flush_seconds,
        finish_timeout_seconds=config.finish_timeout_seconds,
        system_metrics_seconds=config.system_metrics_seconds,
    )
    # The files come first: the remote tracker's finish uploads the status that the files' finish wrote.
    return CompositeTracker([files, remote])


def sync_run(folder: Path, uri: str = "", experiment: str = "") -> int:
    """Upload a run's metrics, parameters, figures and status to MLflow; what is there already is not sent again.

    Args:
        folder: a run folder.
        uri: another server than the one the run was configured with; "" for that one.
        experiment: another experiment; "" for the configured one.

    Returns:
        Number of metric points sent.

    Raises:
        ConfigError: the folder is no run, or the server cannot be reached.
    """
    names = (METRICS_NAME, EVENTS_NAME)
    if not any(place.is_file() for name in names for place in (folder / name, *folder.glob(f"stages/*/{name}"))):
        raise ConfigError(
            f"{folder}: no {METRICS_NAME} and no {EVENTS_NAME}",
            allowed="the folder of a run, such as runs/<run_id>",
            action="list the runs with `hsmn-dist runs`",
        )
    path = folder / RECORD_NAME
    record = read_json(path) if path.is_file() else {}
    where = uri or record.get("uri") or default_uri(folder.parent)
    from hsmn_dist.tracking.mlflow_tracker import MlflowPlace, sync_folder

    place = MlflowPlace(
        uri=where,
        experiment=experiment or record.get("experiment") or TrackingConfig().experiment,
        artifact_root=artifact_root(folder.parent, where),
        run_id=record.get("run_id") or folder.resolve().name,
        tags=record.get("tags", {}),
    )
    try:
        return sync_folder(place, folder)
    except HsmnError:
        raise
    except Exception as error:
        raise ConfigError(
            f"MLflow at {where} did not take the run: {error}",
            allowed="the address of a running MLflow server, or sqlite:///path/mlflow.db",
            action="start the server (`mlflow server --backend-store-uri ...`) and repeat this command; nothing is lost",
        ) from error
