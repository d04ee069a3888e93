"""hsmn-dist probe: can the model recall a fact hidden in long text, by depth and length?"""

from __future__ import annotations

import json
from pathlib import Path

import typer

EXAMPLE = "Example: hsmn-dist probe latest --length 64 --length 256 --trials 4 --plot recall.png"


def command(
    run: str = typer.Argument(help="Run id, its beginning or end, a path, `latest`, or a folder of weights."),
    length: list[int] = typer.Option([64, 256, 1024], help="Words of text. May be repeated."),
    depth: list[float] = typer.Option([0.0, 0.5, 1.0], help="Where the fact lies, from 0 to 1. May be repeated."),
    trials: int = typer.Option(4, min=1, help="Questions of each cell."),
    keys: int = typer.Option(1, min=1, help="Facts hidden in one text; one of them is asked for."),
    plot: Path | None = typer.Option(None, help="Write the heat map there (PNG)."),
    stage: int | None = typer.Option(None, help="Stage whose weights are used; the newest complete one when absent."),
    run_root: Path = typer.Option(Path("runs"), help="Folder of runs."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Recall (exact) and choice (right key against wrong ones) for each depth and length."""
    from hsmn_dist.evaluation.probes import RecallSettings, run_recall_probe
    from hsmn_dist.orchestration.trained_model import load_trained

    settings = RecallSettings(
        kind="multi_key" if keys > 1 else "passkey",
        lengths=tuple(length),
        depths=tuple(depth),
        num_trials=trials,
        num_keys=max(keys, 1),
    )
    result = run_recall_probe(load_trained(run, run_root, stage).text_model(), settings)
    if plot is not None:
        from hsmn_dist.evaluation.figures import recall_figure

        recall_figure(result, plot)
    if as_json:
        typer.echo(json.dumps(result.to_json(), indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("depth", *(f"{words} words" for words in length))
    for row, where in enumerate(depth):
        cells = [f"{100 * result.recalled[row][column]:.0f}%" for column in range(len(length))]
        table.add_row(f"{where:g}", *cells)
    Console().print(table)
