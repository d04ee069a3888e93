"""hsmn-dist verify: the invariants of a model (causality, isolation, cache, gradients, sparsity) on any weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import typer

EXAMPLE = "Examples: hsmn-dist verify latest;  hsmn-dist verify runs/RUN/stages/00_NAME/weights"


def command(
    checkpoint: str = typer.Argument(
        help="Run id, its beginning or end, a path, `latest`, or a folder of weights (also one of save_pretrained)."
    ),
    stage: int | None = typer.Option(
        None, help="Stage whose weights are checked; the newest complete one when absent."
    ),
    step: int | None = typer.Option(
        None,
        help="Optimizer step (from 0) behind which the weights were taken, for the pruning schedule; read from the export "
        "when absent, and else the schedule's end.",
    ),
    seed: int = typer.Option(0, help="Seed of the random tokens."),
    run_root: Path = typer.Option(Path("runs"), help="Folder of runs."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Run every invariant on a CPU and print a table; exit code 1 when one does not hold."""
    from hsmn_dist.models.verify import verify_model
    from hsmn_dist.orchestration.trained_model import load_model

    model, num_steps = load_model(checkpoint, run_root, stage)
    if step is None and num_steps:
        step = num_steps - 1
    results = verify_model(model, step, seed)
    if as_json:
        typer.echo(json.dumps([asdict(result) for result in results], indent=2))
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table("", "invariant", "measured")
        for result in results:
            table.add_row("[green]holds[/]" if result.passed else "[red]broken[/]", result.name, result.detail)
        Console().print(table)
    if not all(result.passed for result in results):
        raise typer.Exit(1)
