"""hsmn-dist scorecard: rebuild a run's scorecard from its stored results and print it; several runs side by side."""

from __future__ import annotations

import json
from pathlib import Path

import typer

EXAMPLE = "Examples: hsmn-dist scorecard latest;  hsmn-dist scorecard RUN_A RUN_B --json"


def command(
    runs: list[str] = typer.Argument(help="Run ids, beginnings or ends of ids, paths, or `latest`."),
    run_root: Path = typer.Option(Path("runs"), help="Folder of runs."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Write scorecard.json, .md, .html and .png anew and print the Markdown."""
    from hsmn_dist.evaluation.scorecard_files import write_scorecard
    from hsmn_dist.evaluation.scorecard_markdown import scorecard_markdown
    from hsmn_dist.orchestration.report import scorecard_of
    from hsmn_dist.orchestration.run_folder import find_run

    folders = [find_run(name, run_root) for name in runs]
    cards = [scorecard_of(folder) for folder in folders]
    for folder, card in zip(folders, cards, strict=True):
        write_scorecard(card, folder.path)
    if as_json:
        typer.echo(json.dumps([card.to_json() for card in cards], indent=2))
        return
    for card in cards:
        typer.echo(scorecard_markdown(card))
