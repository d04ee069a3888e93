"""Tracker: where numbers go. Protocol, and the three trackers that need nothing: Null, InMemory, Composite.

A tracker is passed in, never global. No tracker may stop a run: a back end that fails warns and the run goes on, and
`metrics.jsonl` (`jsonl_tracker`) is always written beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from hsmn_dist.foundation.errors import HsmnError
from hsmn_dist.foundation.log import logger, warn_once

FinishStatus = Literal["finished", "failed", "preempted"]
"""finished: the stage or run reached its end. failed: it raised. preempted: it was told to go and will be resumed."""

_log = logger(__name__)


class Tracker(Protocol):
    """What the training loop and the curriculum see.

    Steps are optimizer steps of the stage (0-based, the step that was just taken) for `train/*` and `perf/*`, and stage
    indices for `transfer/*` and `task/*`. Every method returns at once and none of them raises for a back end's trouble.
    """

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record settings. Logging a name again with the same value is allowed (a resumed run does)."""

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers at `step`; names come from `metric_names`."""

    def rewind(self, step: int) -> None:
        """Forget this stage's numbers at `step` and beyond: training went back, and takes those steps again."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Keep a file or folder; `folder` is where it goes inside the run's artifacts."""

    def log_figure(self, path: Path) -> None:
        """Keep a picture (PNG, SVG or HTML) where the back end shows figures."""

    def log_dataset(self, name: str, digest: str, source: str, context: str = "training") -> None:
        """Record that data of this digest was used; `source` is a hub id or a path."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Record searchable labels; a later value replaces an earlier one."""

    def finish(self, status: FinishStatus = "finished") -> None:
        """Write what is still buffered and close. Calling it again does nothing."""


class NullTracker:
    """Forgets everything: the tracker of ranks above 0."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """See Tracker."""

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """See Tracker."""

    def rewind(self, step: int) -> None:
        """See Tracker."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """See Tracker."""

    def log_figure(self, path: Path) -> None:
        """See Tracker."""

    def log_dataset(self, name: str, digest: str, source: str, context: str = "training") -> None:
        """See Tracker."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """See Tracker."""

    def finish(self, status: FinishStatus = "finished") -> None:
        """See Tracker."""


@dataclass
class InMemoryTracker:
    """Keeps everything in lists and dicts, for tests and notebooks.

    Attributes:
        points: (metric name, step, value) in the order they came.
    """

    params: dict[str, Any] = field(default_factory=dict)
    points: list[tuple[str, int, float]] = field(default_factory=list)
    artifacts: list[tuple[Path, str]] = field(default_factory=list)
    figures: list[Path] = field(default_factory=list)
    datasets: list[tuple[str, str, str, str]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    status: FinishStatus | None = None

    def log_params(self, params: Mapping[str, Any]) -> None:
        """See Tracker."""
        self.params.update(params)

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """See Tracker."""
        self.points.extend((name, step, float(value)) for name, value in values.items())

    def rewind(self, step: int) -> None:
        """See Tracker."""
        self.points = [point for point in self.points if point[1] < step]

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """See Tracker."""
        self.artifacts.append((path, folder))

    def log_figure(self, path: Path) -> None:
        """See Tracker."""
        self.figures.append(path)

    def log_dataset(self, name: str, digest: str, source: str, context: str = "training") -> None:
        """See Tracker."""
        self.datasets.append((name, digest, source, context))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """See Tracker."""
        self.tags.update(tags)

    def finish(self, status: FinishStatus = "finished") -> None:
        """See Tracker."""
        if self.status is None:
            self.status = status

    def series(self, name: str) -> list[tuple[int, float]]:
        """The (step, value) points of one metric, in the order they came."""
        return [(step, value) for point, step, value in self.points if point == name]


class CompositeTracker:
    """Passes every call to several trackers. One that raises is reported once per kind of call, and the others go on."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = tuple(trackers)

    def _each(self, method: str, *arguments: Any) -> None:
        for tracker in self.trackers:
            # A tracker is a process boundary: whatever its back end raises must not end hours of training.
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:
                name = type(tracker).__name__
                key = f"{name}.{method}.{id(tracker)}"
                warn_once(_log, key, f"{name}.{method} failed, and the run goes on (said once): {error!r}")

    def log_params(self, params: Mapping[str, Any]) -> None:
        """See Tracker."""
        self._each("log_params", params)

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """See Tracker."""
        self._each("log_metrics", values, step)

    def rewind(self, step: int) -> None:
        """See Tracker."""
        self._each("rewind", step)

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """See Tracker."""
        self._each("log_artifact", path, folder)

    def log_figure(self, path: Path) -> None:
        """See Tracker."""
        self._each("log_figure", path)

    def log_dataset(self, name: str, digest: str, source: str, context: str = "training") -> None:
        """See Tracker."""
        self._each("log_dataset", name, digest, source, context)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """See Tracker."""
        self._each("set_tags", tags)

    def finish(self, status: FinishStatus = "finished") -> None:
        """See Tracker."""
        self._each("finish", status)


class FencedTracker:
    """Passes calls on while this process may write; a process that was cut off and replaced gets the fence's error instead.

    Outside a `CompositeTracker`, which would only warn of it: the numbers of two attempts must never mix.
    """

    def __init__(self, tracker: Tracker, check: Callable[[], None]) -> None:
        self._tracker = tracker
        self._check = check

    def log_params(self, params: Mapping[str, Any]) -> None:
        """See Tracker."""
        self._check()
        self._tracker.log_params(params)

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """See Tracker."""
        self._check()
        self._tracker.log_metrics(values, step)

    def rewind(self, step: int) -> None:
        """See Tracker."""
        self._check()
        self._tracker.rewind(step)

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """See Tracker."""
        self._check()
        self._tracker.log_artifact(path, folder)

    def log_figure(self, path: Path) -> None:
        """See Tracker."""
        self._check()
        self._tracker.log_figure(path)

    def log_dataset(self, name: str, digest: str, source: str, context: str = "training") -> None:
        """See Tracker."""
        self._check()
        self._tracker.log_dataset(name, digest, source, context)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """See Tracker."""
        self._check()
        self._tracker.set_tags(tags)

    def finish(self, status: FinishStatus = "finished") -> None:
        """See Tracker. Of a process that was replaced, nothing is written: the stage goes on elsewhere."""
        try:
            self._check()
        except HsmnError as error:
            _log.warning("the tracker is left as it is: %s", error.found)
            return
        self._tracker.finish(status)
