"""hsmn-dist study: every method with every seed on one curriculum, and one report (Markdown, JSON, PNG)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from hsmn_dist.foundation.errors import ConfigError

if TYPE_CHECKING:
    from hsmn_dist.orchestration.curriculum import Run
    from hsmn_dist.orchestration.study import StudyRun

EXAMPLE = "Example: hsmn-dist study configs/runs/study_forgetting_cpu.yaml"


def command(
    config: Path = typer.Argument(help="Study file: a base run, variants, seeds."),
    run_root: Path = typer.Option(Path("runs"), help="Folder of runs; the study's are in a folder of its name."),
    only: list[str] = typer.Option([], "--only", help="Run this variant alone. May be repeated."),
    task_index: int | None = typer.Option(
        None,
        help="Bring this one run to its end, counted from 0, seeds inside variants: a task of a job array. The last writes the report.",
    ),
    report_only: bool = typer.Option(False, "--report-only", help="Write the report of what is complete."),
) -> None:
    """Run what is not complete (a killed study goes on), then write study.md, study.json and study.png."""
    from rich.console import Console

    from hsmn_dist.cli.drive import drive
    from hsmn_dist.config.study import load_study
    from hsmn_dist.foundation.log import configure_logging
    from hsmn_dist.orchestration.study import run_pending, study_runs
    from hsmn_dist.orchestration.study_report import write_study_report

    configure_logging()
    study = load_study(config)
    runs = study_runs(config, study, run_root)
    console = Console(stderr=True)
    if task_index is not None:
        if only or report_only:
            raise ConfigError(
                "--task-index with --only or --report-only",
                allowed="one of the three",
                action="leave the others out",
            )
        one = _chosen(runs, task_index)
        _ensure(one)
        num_complete = sum(run.is_complete for run in runs)
        console.print(f"{one.variant}, seed {one.seed}: complete; {num_complete} of {len(runs)} are", highlight=False)
        if num_complete < len(runs):
            return
    elif not report_only:
        wanted = [run for run in runs if not only or run.variant in only]
        launcher = wanted[0].config.cluster.launcher if wanted else "inline"
        done = run_pending(wanted, lambda run: drive(run, launcher, quiet=True, prints=False))
        for number, run in enumerate(done, 1):
            console.print(f"{number}/{len(wanted)} {run.variant}, seed {run.seed}: complete", highlight=False)
    path = write_study_report(study, runs, run_root / study.name)
    typer.echo(path.read_text(encoding="utf-8"))
    typer.echo(f"Report: {path}")


def _chosen(runs: list[StudyRun], index: int) -> StudyRun:
    if not 0 <= index < len(runs):
        raise ConfigError(
            f"--task-index {index}: the study has {len(runs)} runs",
            allowed=f"0 to {len(runs) - 1}",
            action="make the array again with `hsmn-dist slurm STUDY`",
        )
    return runs[index]


def _ensure(one: StudyRun) -> None:
    """Bring one run to its end under a lease: a task that was queued twice follows the first.

    The lease's name has the settings' digest, so that a variant that was changed since is a new run, as in `hsmn-dist study`.
    """
    from hsmn_dist.cli.drive import drive
    from hsmn_dist.config.load import config_digest
    from hsmn_dist.foundation.files import write_json
    from hsmn_dist.orchestration.named_run import NamedRun, ensure_run

    digest = config_digest(one.config)
    named = NamedRun(Path(one.config.run_root).resolve(), f"{one.config.name}-{digest[:8]}")
    found = one.find()
    if found is not None and named.folder() is None:  # begun by `hsmn-dist study`, which gives no names
        write_json(named.record, {"run_id": found.run_id, "config_digest": digest})

    def run_it(run: Run) -> None:
        drive(run, run.config.cluster.launcher, quiet=True, prints=False)

    ensure_run(named, one.config, run_it, lambda text: typer.echo(text, err=True))
