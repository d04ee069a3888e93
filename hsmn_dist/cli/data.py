"""hsmn-dist data: list the known datasets, show one, check a folder of shards."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import typer

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="List the known datasets, show one, check prepared shards.",
    epilog="Example: hsmn-dist data show gsm8k",
)
AS_JSON = typer.Option(False, "--json", help="Print JSON.")


@app.command("list", epilog="Example: hsmn-dist data list")
def list_command(as_json: bool = AS_JSON) -> None:
    """Every dataset name that a configuration may use."""
    from hsmn_dist.data.catalogue import list_datasets

    lines = list_datasets()
    if as_json:
        typer.echo(json.dumps([asdict(line) for line in lines], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "comes from", "kind", "metric", "licence", "trains")
    for line in lines:
        table.add_row(line.name, line.origin, line.kind, line.metric, line.licence, "yes" if line.may_train else "no")
    Console().print(table)


@app.command("show", epilog="Example: hsmn-dist data show passkey")
def show_command(name: str = typer.Argument(help="Dataset name.")) -> None:
    """Everything that is known of one dataset, as JSON."""
    from hsmn_dist.data.catalogue import show_dataset

    typer.echo(json.dumps(show_dataset(name), indent=2, default=str))


@app.command("check", epilog="Example: hsmn-dist data check runs/prepared/DIGEST/passkey")
def check_command(shards: list[Path] = typer.Argument(help="Prepared folders."), as_json: bool = AS_JSON) -> None:
    """Read every byte of prepared folders and compare it with their indexes; exit code 2 when something is wrong."""
    from hsmn_dist.data.catalogue import check_folder

    reports = [check_folder(folder) for folder in shards]
    if as_json:
        typer.echo(json.dumps([asdict(report) for report in reports], indent=2))
    for report in [] if as_json else reports:
        state = "whole" if report.is_whole else f"{len(report.problems)} problems"
        typer.echo(f"{report.folder}: {state}; samples {report.num_samples}, shards {report.num_shards}")
        for problem in report.problems:
            typer.echo(f"  {problem}")
    if not all(report.is_whole for report in reports):
        raise typer.Exit(2)
