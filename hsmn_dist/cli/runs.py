"""hsmn-dist runs: list the runs, show one, and say in plain words why one stopped."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import typer

from hsmn_dist.foundation.units import format_seconds
from hsmn_dist.orchestration.curriculum import load_stored_config
from hsmn_dist.orchestration.journal import read_events, run_status
from hsmn_dist.orchestration.post_mortem import explain
from hsmn_dist.orchestration.run_folder import RunFolder, find_run, list_runs
from hsmn_dist.orchestration.stage import training_stages

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="List runs, show one, say why one failed.",
    epilog="Example: hsmn-dist runs show latest",
)
ROOT = typer.Option(Path("runs"), help="Folder of runs.")


@app.command("list", epilog="Example: hsmn-dist runs list")
def list_command(run_root: Path = ROOT, as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """List the runs under a root, oldest first."""
    rows = [_summary(folder) for folder in list_runs(run_root)]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("run", "status", "stages", "last event", "age")
    for row in rows:
        age = format_seconds(time.time() - row["last_time"]) if row["last_time"] else ""
        table.add_row(row["run_id"], row["status"], f"{row['stages_complete']}/{row['stages']}", row["last_event"], age)
    Console().print(table)


@app.command("show", epilog="Example: hsmn-dist runs show latest")
def show_command(
    run: str = typer.Argument(help="Run id, its beginning or end, a path, or `latest`."),
    run_root: Path = ROOT,
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Show where a run stands; of one that stopped: what failed, where, and what to do."""
    folder = find_run(run, run_root)
    row = _summary(folder)
    row["explanation"] = explain(folder)
    if as_json:
        typer.echo(json.dumps(row, indent=2))
        return
    typer.echo(f"{row['run_id']}: {row['status']}, {row['stages_complete']} of {row['stages']} stages complete")
    for line in row["explanation"]:
        typer.echo(f"  {line}")


def _summary(folder: RunFolder) -> dict[str, Any]:
    config = load_stored_config(folder)
    events = read_events(folder.journal)
    complete = [folder.stage(index, stage.name).is_complete for index, stage in enumerate(training_stages(config))]
    return {
        "run_id": folder.run_id,
        "path": str(folder.path),
        "status": run_status(events),
        "stages": len(complete),
        "stages_complete": sum(complete),
        "last_event": events[-1]["event"] if events else "",
        "last_time": events[-1].get("time", 0.0) if events else 0.0,
    }
