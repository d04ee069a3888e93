"""Drive a run to its end: data, launcher, live view, scorecard. Shared by `run` and whatever starts runs in a row."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import typer
from rich.console import Console

from hsmn_dist.cli.live_view import LiveView
from hsmn_dist.cli.prepare import terminal_progress
from hsmn_dist.config.cluster import ClusterConfig
from hsmn_dist.foundation.errors import ConfigError, Preempted
from hsmn_dist.orchestration.curriculum import Run, record_prepared, run_curriculum
from hsmn_dist.orchestration.launcher import LocalLauncher, StageLauncher
from hsmn_dist.orchestration.report import open_parent_tracker, write_report
from hsmn_dist.orchestration.stage import training_stages
from hsmn_dist.tracking.tracker import FinishStatus


def build_launcher(name: str, cluster: ClusterConfig) -> StageLauncher:
    """The launcher of that name; Ray is imported only when it is chosen."""
    if name == "local":
        return LocalLauncher(cluster)
    if name == "inline":
        from hsmn_dist.orchestration.inline_launcher import InlineLauncher

        return InlineLauncher(cluster)
    if name != "ray":
        raise ConfigError(f"--launcher {name}", allowed="ray, local, inline", action="choose one of them")
    from hsmn_dist.orchestration.ray_launcher import RayLauncher

    return RayLauncher(cluster)


def drive(run: Run, launcher_name: str, quiet: bool = False, prints: bool = True) -> Path:
    """Prepare what is not prepared, run the pending stages, write the scorecard; returns its path."""
    console = Console(stderr=True, quiet=quiet)
    folder = run.folder
    console.print(f"run {folder.run_id} in {folder.path}", highlight=False)
    launcher = build_launcher(launcher_name, run.config.cluster)
    tracker = open_parent_tracker(run.config, folder)
    status: FinishStatus = "failed"
    try:
        with _view(run, console, quiet):
            run_curriculum(run, launcher, _prepare, lambda run: write_report(run.folder, tracker))
        status = "finished"
    except Preempted:
        status = "preempted"
        raise
    finally:
        tracker.finish(status)
    if not prints:
        return folder.scorecard
    lines = [(folder.path / "scorecard.md").read_text(encoding="utf-8"), *_next_commands(run)]
    typer.echo("\n".join(lines))
    return folder.scorecard


@contextlib.contextmanager
def _view(run: Run, console: Console, quiet: bool) -> Iterator[None]:
    if quiet:
        yield
        return
    with LiveView(run.folder, [stage.name for stage in training_stages(run.config)], console):
        yield


def _prepare(run: Run) -> None:
    """Shards of every dataset of the curriculum; reused when an earlier run made the same."""
    from hsmn_dist.data.prepare import prepare_curriculum

    config = run.config
    datasets = [dataset for stage in config.curriculum.stages for dataset in stage.datasets]
    root = Path(config.run_root) / "prepared"
    with terminal_progress() as progress:
        prepared = prepare_curriculum(datasets, config.data, config.tokenizer, root, progress)
    record_prepared(run.folder, prepared.tokenizer_path, prepared.folders)


def _next_commands(run: Run) -> list[str]:
    from hsmn_dist.tracking.build import default_uri

    tracking = run.config.tracking
    lines = [f"Scorecard: {run.folder.path / 'scorecard.html'}"]
    if tracking.backend == "mlflow":
        uri = tracking.uri or default_uri(Path(run.config.run_root))
        open_it = uri if uri.startswith("http") else f"mlflow ui --host 127.0.0.1 --backend-store-uri {uri}"
        lines.append(f"Metrics and figures: {open_it}")
    return lines
