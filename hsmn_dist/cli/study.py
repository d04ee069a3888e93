"""hsmn-dist study: every method with every seed on one curriculum, and one report (Markdown, JSON, PNG)."""

from __future__ import annotations

from pathlib import Path

import typer

EXAMPLE = "Example: hsmn-dist study configs/runs/study_forgetting_cpu.yaml"


def command(
    config: Path = typer.Argument(help="Study file: a base run, variants, seeds."),
    run_root: Path = typer.Option(Path("runs"), help="Folder of runs; the study's are in a folder of its name."),
    only: list[str] = typer.Option([], "--only", help="Run this variant alone. May be repeated."),
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
    if not report_only:
        wanted = [run for run in runs if not only or run.variant in only]
        launcher = wanted[0].config.cluster.launcher if wanted else "inline"
        done = run_pending(wanted, lambda run: drive(run, launcher, quiet=True, prints=False))
        for number, run in enumerate(done, 1):
            console.print(f"{number}/{len(wanted)} {run.variant}, seed {run.seed}: complete", highlight=False)
    path = write_study_report(study, runs, run_root / study.name)
    typer.echo(path.read_text(encoding="utf-8"))
    typer.echo(f"Report: {path}")
