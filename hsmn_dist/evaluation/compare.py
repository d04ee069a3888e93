"""Several runs of one curriculum side by side: a table (Markdown, JSON) and one PNG with heat maps and forgetting curves.

Runs are comparable only when they scored the same tasks in the same order; anything else is refused. A number that a run has
not measured stays "not measured". Source: continual.md section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hsmn_dist.evaluation.figures import draw_forgetting, draw_matrix, matrix_bounds, new_figure, save_figure
from hsmn_dist.evaluation.markdown import markdown_table
from hsmn_dist.evaluation.scorecard import Scorecard
from hsmn_dist.foundation.errors import DataError
from hsmn_dist.foundation.files import write_json, write_text

COLUMNS = (
    ("average_accuracy", "average"),
    ("learning_accuracy", "just learned"),
    ("forgetting", "forgetting"),
    ("backward_transfer", "backward"),
    ("forward_transfer", "forward"),
)


def compare_scorecards(cards: Sequence[Scorecard], labels: Sequence[str]) -> list[dict[str, Any]]:
    """One JSON row per run: label, method facts, transfer metrics of scores and of losses (losses as positive nats).

    Raises:
        DataError: fewer than two runs, labels that do not fit, or runs of other tasks.
    """
    if len(cards) < 2 or len(cards) != len(labels):
        raise DataError(
            f"{len(cards)} runs with {len(labels)} labels",
            allowed="two runs or more, one label each",
            action="name the runs to compare",
        )
    for card, label in zip(cards, labels, strict=True):
        if card.tasks != cards[0].tasks:
            raise DataError(
                f"run {label} has the tasks {card.tasks}, run {labels[0]} has {cards[0].tasks}",
                allowed="runs of one curriculum, same tasks in the same order",
                action="compare runs that differ in method or seed alone",
            )
    return [
        {
            "label": label,
            "run_id": card.run.get("run_id"),
            "method": card.run.get("method"),
            "estimator": card.run.get("estimator"),
            "strength": card.run.get("strength"),
            "num_stages": len(card.stages),
            "scores": score_columns(card),
            "losses": loss_columns(card),
        }
        for card, label in zip(cards, labels, strict=True)
    ]


def write_comparison(cards: Sequence[Scorecard], labels: Sequence[str], folder: Path) -> str:
    """Write comparison.json, comparison.md and comparison.png into `folder`; returns the Markdown."""
    rows = compare_scorecards(cards, labels)
    folder.mkdir(parents=True, exist_ok=True)
    markdown = comparison_markdown(rows, cards[0].tasks)
    write_json(folder / "comparison.json", {"tasks": cards[0].tasks, "runs": rows})
    write_text(folder / "comparison.md", markdown)
    comparison_figure(cards, labels, folder / "comparison.png")
    return markdown


def comparison_markdown(rows: Sequence[dict[str, Any]], tasks: Sequence[str]) -> str:
    """Two tables: scores in percent, losses in nats per target token. Intervals in brackets where measured."""
    lines = [f"# Comparison of {len(rows)} runs", "", f"Tasks in order: {', '.join(tasks)}.", ""]
    for key, title, factor, digits in (
        ("scores", "Scores, percent (higher is better; forgetting lower)", 100.0, 1),
        ("losses", "Losses, nats per target token (lower is better)", 1.0, 3),
    ):
        head = ["run", *(name for _, name in COLUMNS)]
        table = [[row["label"], *(_cell(row[key], column, factor, digits) for column, _ in COLUMNS)] for row in rows]
        lines += [f"## {title}", "", markdown_table(head, table, num_left=1), ""]
    return "\n".join(lines)


def comparison_figure(cards: Sequence[Scorecard], labels: Sequence[str], path: Path) -> Path:
    """A column for each run: heat map of the losses above, forgetting over the stages below."""
    figure = new_figure(4.6 * len(cards), 7.6)
    axes = figure.subplots(2, len(cards), squeeze=False)
    bounds = matrix_bounds(cards, is_loss=True)  # one scale of colours, or the heat maps could not be compared
    for column, (card, label) in enumerate(zip(cards, labels, strict=True)):
        draw_matrix(axes[0][column], card, is_loss=True, bounds=bounds)
        axes[0][column].set_title(label, fontsize=10)
        draw_forgetting(axes[1][column], card, is_loss=True)
    low = min(axis.get_ylim()[0] for axis in axes[1])
    high = max(axis.get_ylim()[1] for axis in axes[1])
    for axis in axes[1]:
        axis.set_ylim(low, high)
    return save_figure(figure, path)


def score_columns(card: Scorecard) -> dict[str, Any] | None:
    """The columns of `COLUMNS` measured in scores, with their intervals; None where nothing was scored."""
    return _picked(card.transfer_scores, 1.0)


def loss_columns(card: Scorecard) -> dict[str, Any] | None:
    """The columns of `COLUMNS` measured in losses: levels are positive nats, differences keep their meaning."""
    return _picked(card.transfer_losses, -1.0)


def _picked(metrics: dict[str, Any] | None, sign: float) -> dict[str, Any] | None:
    """The columns of a metrics dictionary; levels (not differences) of negated losses become positive again."""
    if metrics is None:
        return None
    picked: dict[str, Any] = {"intervals": {}}
    for name, _ in COLUMNS:
        value, interval = metrics.get(name), (metrics.get("intervals") or {}).get(name)
        is_level = name in ("average_accuracy", "learning_accuracy")
        factor = sign if is_level else 1.0
        picked[name] = None if value is None else factor * value
        if interval is not None:
            picked["intervals"][name] = sorted(factor * bound for bound in interval)
    return picked


def _cell(metrics: dict[str, Any] | None, name: str, factor: float, digits: int) -> str:
    value = None if metrics is None else metrics[name]
    if metrics is None or value is None:
        return "not measured"
    text = f"{factor * value:.{digits}f}"
    interval = metrics["intervals"].get(name)
    return (
        text if interval is None else f"{text} [{factor * interval[0]:.{digits}f}, {factor * interval[1]:.{digits}f}]"
    )
