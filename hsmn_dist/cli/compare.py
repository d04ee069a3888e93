"""hsmn-dist compare: runs side by side, as a table, heat maps and forgetting curves."""

from __future__ import annotations

from pathlib import Path

import typer

EXAMPLE = "Example: hsmn-dist compare RUN_A RUN_B --out comparison"


def command(
    runs: list[str] = typer.Argument(help="Run ids, beginnings or ends of ids, paths, or `latest`."),
    out: Path = typer.Option(Path("comparison"), help="Folder for comparison.md, .json and .png."),
    run_root: Path = typer.Option(Path("runs"), help="Folder of runs."),
) -> None:
    """Compare runs on the same tasks: accuracy, transfer and forgetting with their intervals."""
    from hsmn_dist.evaluation.compare import write_comparison
    from hsmn_dist.orchestration.report import scorecard_of
    from hsmn_dist.orchestration.run_folder import find_run

    folders = [find_run(name, run_root) for name in runs]
    cards = [scorecard_of(folder) for folder in folders]
    typer.echo(write_comparison(cards, [folder.run_id for folder in folders], out))
    typer.echo(f"Pictures: {out / 'comparison.png'}")
