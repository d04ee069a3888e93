"""hsmn-dist track: upload a run's metrics, figures and status to MLflow later, each point once."""

from __future__ import annotations

from pathlib import Path

import typer

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Upload a run's metrics to MLflow later.",
    epilog="Example: hsmn-dist track sync latest",
)


@app.callback()
def group() -> None:
    """Upload a run's metrics to MLflow later."""


@app.command("sync", epilog="Example: hsmn-dist track sync latest --uri http://tracker:5000")
def sync_command(
    run: str = typer.Argument(help="Run id, its beginning or end, a path, or `latest`."),
    uri: str = typer.Option("", help="Another server or database than the run's own."),
    experiment: str = typer.Option("", help="Another experiment than the run's own."),
    run_root: Path = typer.Option(Path("runs"), help="Folder of runs."),
) -> None:
    """Send what the tracker does not have yet; what is there is not sent again."""
    from hsmn_dist.orchestration.run_folder import find_run
    from hsmn_dist.tracking.build import sync_run

    sent = sync_run(find_run(run, run_root).path, uri, experiment)
    typer.echo(f"{sent} metric points were sent")
