"""Figures: task matrix, forgetting curves, loss curves, gradient norms. Agg only; matplotlib is imported on first use.

Every function takes plain values and writes one PNG; none touches matplotlib's global state (no pyplot).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsmn_dist.evaluation.scorecard import Scorecard
from hsmn_dist.foundation.extras import require
from hsmn_dist.foundation.files import atomic_path
from hsmn_dist.tracking import metric_names

if TYPE_CHECKING:
    from hsmn_dist.evaluation.probes import RecallResult

Series = Mapping[str, Sequence[tuple[int, float]]]

_DPI = 110


def new_figure(width: float, height: float) -> Any:
    """An empty figure of a size in inches, drawn without a display."""
    figure_module = require("matplotlib.figure")
    canvas_module = require("matplotlib.backends.backend_agg")
    figure = figure_module.Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    canvas_module.FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> Path:
    """Write a figure as PNG, whole or not at all; gives the path."""
    with atomic_path(path) as aside:
        figure.savefig(aside, format="png")
    return path


def matrix_rows(card: Scorecard, is_loss: bool) -> list[tuple[str, list[float | None]]]:
    """Names and cells of a heat map's rows: before training, if it was measured, and after every stage."""
    matrix = card.loss_matrix if is_loss else card.score_matrix
    baseline = card.baseline_losses if is_loss else card.baseline_scores
    rows = [("before", baseline)] if any(value is not None for value in baseline) else []
    return rows + [(f"after {stage.name}", row) for stage, row in zip(card.stages, matrix, strict=True)]


def matrix_bounds(cards: Sequence[Scorecard], is_loss: bool) -> tuple[float, float]:
    """The least and largest value that the colours of these cards' heat maps must tell apart."""
    known = [value for card in cards for _, row in matrix_rows(card, is_loss) for value in row if value is not None]
    return (min(known), max(known)) if known and is_loss else (0.0, 1.0)


def draw_matrix(axes: Any, card: Scorecard, is_loss: bool, bounds: tuple[float, float] | None = None) -> None:
    """Heat map of task (column) after stage (row); a cell that was not measured is hatched and says so.

    `bounds` are the values of the first and last colour; None: those of this card.
    """
    rows = matrix_rows(card, is_loss)
    low, high = bounds or matrix_bounds([card], is_loss)
    values = [[float("nan") if value is None else value for value in row] for _, row in rows]
    image = axes.imshow(
        values,
        cmap="viridis_r" if is_loss else "viridis",
        vmin=low,
        vmax=high if high > low else low + 1.0,
        aspect="auto",
    )
    middle = (low + high) / 2
    for y, (_, row) in enumerate(rows):
        for x, value in enumerate(row):
            if value is None:
                axes.text(x, y, "not\nmeasured", ha="center", va="center", fontsize=7, color="black")
                continue
            is_dark = value > middle if is_loss else value < middle
            text = f"{value:.3f}" if is_loss else f"{100 * value:.1f}"
            axes.text(x, y, text, ha="center", va="center", color="white" if is_dark else "black")
    axes.set_facecolor("0.85")
    axes.set_xticks(range(len(card.tasks)), card.tasks, rotation=20 if len(card.tasks) > 3 else 0, fontsize=8)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axes.set_title("loss, nats per target token" if is_loss else "score, percent", fontsize=10)
    axes.figure.colorbar(image, ax=axes, fraction=0.05)


def draw_forgetting(axes: Any, card: Scorecard, is_loss: bool) -> None:
    """One line per task over the stages; the dot marks the stage that trained it."""
    matrix = card.loss_matrix if is_loss else card.score_matrix
    baseline = card.baseline_losses if is_loss else card.baseline_scores
    for column, task in enumerate(card.tasks):
        points = [(0, baseline[column])] + [(index + 1, row[column]) for index, row in enumerate(matrix)]
        known = [(x, y if is_loss else 100 * y) for x, y in points if y is not None]
        if not known:
            continue
        (line,) = axes.plot(*zip(*known, strict=True), marker=".", label=task)
        own = [(x, y) for x, y in known if x >= 1 and card.stages[x - 1].name == task]
        axes.plot(
            [x for x, _ in own], [y for _, y in own], marker="o", linestyle="", color=line.get_color(), markersize=9
        )
    names = ["before", *[stage.name for stage in card.stages]]
    axes.set_xticks(range(len(names)), names, rotation=20 if len(names) > 3 else 0, fontsize=8)
    axes.set_ylabel("nats per token" if is_loss else "percent", fontsize=8)
    axes.set_title("each task over the stages (large dot: its own stage)", fontsize=10)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=8)


def matrix_figure(card: Scorecard, path: Path) -> Path:
    """Heat maps of scores and losses, side by side."""
    width = max(4.5, 1.1 * len(card.tasks) + 2.5)
    figure = new_figure(2 * width, 0.6 * len(card.stages) + 2.2)
    draw_matrix(figure.add_subplot(1, 2, 1), card, is_loss=False)
    draw_matrix(figure.add_subplot(1, 2, 2), card, is_loss=True)
    return save_figure(figure, path)


def scorecard_figure(card: Scorecard, path: Path) -> Path:
    """The scorecard as one picture: both heat maps, and both bundles of curves."""
    width = max(5.0, 1.1 * len(card.tasks) + 2.5)
    figure = new_figure(2 * width, 0.6 * len(card.stages) + 6.5)
    figure.suptitle(f"{card.run.get('run_id', '')}  {card.run.get('family', '')}".strip(), fontsize=11)
    for place, is_loss in ((1, False), (2, True)):
        draw_matrix(figure.add_subplot(2, 2, place), card, is_loss)
        draw_forgetting(figure.add_subplot(2, 2, place + 2), card, is_loss)
    return save_figure(figure, path)


def loss_figure(stages: Mapping[str, Series], path: Path) -> Path:
    """Training loss, validation loss and penalty of every stage, one after the other on the step axis.

    Args:
        stages: stage name -> metric name -> (step, value) points, as `read_series` gives them.
        path: where the PNG goes.
    """
    figure = new_figure(9.0, 4.0)
    axes = figure.add_subplot(1, 1, 1)
    names = {
        metric_names.TRAIN_LOSS: ("train", "-", 0.6),
        metric_names.VALIDATION_LOSS: ("validation", "o-", 1.0),
        metric_names.TRAIN_PENALTY: ("penalty", ":", 0.8),
    }
    start = 0
    for index, (stage, series) in enumerate(stages.items()):
        axes.axvline(start, color="0.7", linewidth=0.8)
        axes.annotate(stage, (start, 1.0), xycoords=("data", "axes fraction"), fontsize=8, va="bottom")
        for place, (name, (label, style, alpha)) in enumerate(names.items()):
            points = [(start + step, value) for step, value in series.get(name, []) if value == value]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    style,
                    color=f"C{place}",
                    alpha=alpha,
                    markersize=3,
                    label=label if index == 0 else None,
                )
        start += 1 + max((step for points in series.values() for step, _ in points), default=0)
    axes.set_xlabel("optimizer steps of the curriculum")
    axes.set_ylabel("nats per target token")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    return save_figure(figure, path)


def gradient_figure(series: Series, path: Path) -> Path:
    """Gradient norm of the whole model and of its components, logarithmic."""
    figure = new_figure(9.0, 4.0)
    axes = figure.add_subplot(1, 1, 1)
    for name, points in sorted(series.items()):
        is_component = name.startswith(metric_names.GRADIENT_NORM_PREFIX)
        positive = [(step, value) for step, value in points if value > 0]
        if positive and (is_component or name == metric_names.TRAIN_GRADIENT_NORM):
            label = name[len(metric_names.GRADIENT_NORM_PREFIX) :] if is_component else "whole model"
            axes.plot(*zip(*positive, strict=True), label=label, linewidth=1.0 if is_component else 1.8)
    if axes.lines:
        axes.set_yscale("log")
        axes.legend(fontsize=8, ncols=2)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("gradient norm before clipping")
    axes.grid(alpha=0.3)
    return save_figure(figure, path)


def recall_figure(result: RecallResult, path: Path) -> Path:
    """The heat map of recall, depth of the fact (row, 0 is the beginning) by length: written out, and chosen among keys."""
    lengths, depths = result.settings["lengths"], result.settings["depths"]
    figure = new_figure(2 * (0.9 * len(lengths) + 2.2), 0.45 * len(depths) + 2.2)
    chance = 1.0 / result.settings["num_choices"]
    titles = ((result.recalled, "written out"), (result.chosen, f"chosen among keys (chance {100 * chance:.0f}%)"))
    for place, (scores, title) in enumerate(titles, 1):
        axes = figure.add_subplot(1, 2, place)
        image = axes.imshow(scores, cmap="RdYlGn", vmin=0.0, vmax=1.0, aspect="auto")
        for y, row in enumerate(scores):
            for x, value in enumerate(row):
                color = "black" if 0.2 < value < 0.8 else "white"
                axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=color)
        marks = [" *" if is_longer else "" for is_longer in result.is_longer_than_limit or [False] * len(lengths)]
        labels = [f"{length}{mark}" for length, mark in zip(lengths, marks, strict=True)]
        axes.set_xticks(range(len(lengths)), labels, rotation=30, fontsize=8)
        axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f}%" for depth in depths], fontsize=8)
        axes.set_xlabel("words of text" + (" (* longer than the model's context)" if any(marks) else ""), fontsize=8)
        axes.set_ylabel("depth of the fact", fontsize=8)
        axes.set_title(title, fontsize=10)
    figure.suptitle(f"recall, {result.settings['kind']}, {result.settings['num_trials']} questions a cell", fontsize=10)
    figure.colorbar(image, ax=figure.axes, label="share of questions", fraction=0.05)
    return save_figure(figure, path)


def study_figure(panels: Mapping[str, Mapping[str, Sequence[float] | None]], path: Path) -> Path:
    """Methods side by side: the bar is the mean over seeds, each dot a seed; no bar where a method has no such number.

    Args:
        panels: title -> method -> one number for each seed.
        path: where the PNG goes.
    """
    num_rows = max(map(len, panels.values()))
    figure = new_figure(4.6 * len(panels), 0.4 * num_rows + 1.4)
    for place, (title, methods) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), place)
        for row, values in enumerate(methods.values()):
            if values:
                axes.barh(row, sum(values) / len(values), color=f"C{row}", alpha=0.5)
                axes.plot(values, [row] * len(values), "o", color=f"C{row}", markersize=4)
        axes.set_yticks(range(len(methods)), list(methods) if place == 1 else [], fontsize=8)
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3, axis="x")
    return save_figure(figure, path)
