"""Accuracy matrix -> average accuracy, backward and forward transfer, forgetting, with bootstrap intervals. Pure.

`matrix[i][j]` is task j's score after stage i (both from 0, accuracy-like, higher is better); `None` means not measured and
is never counted as 0. Rows may be fewer than tasks while a curriculum runs: then the metrics are those of the tasks learned
so far. The bootstrap draws a task's examples with replacement once and applies the draw to every stage's scores of that
task, because the stages are scored on the same examples.

Sources: Lopez-Paz and Ranzato 2017, arXiv 1706.08840, eq. 2 to 4 (ACC, BWT, FWT); Chaudhry et al. 2018, arXiv 1801.10112,
eq. 3 (forgetting); Efron 1979 (percentile bootstrap).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hsmn_dist.foundation.errors import DataError

Score = float | None
Matrix = Sequence[Sequence[Score]]
ExampleScores = Sequence[Sequence[Sequence[float] | None]]


@dataclass(frozen=True)
class TransferMetrics:
    """Transfer numbers of a curriculum; a metric is None where nothing it needs was measured.

    Attributes:
        average_accuracy: mean over tasks of the last row.
        backward_transfer: mean over tasks before the last of (last row - diagonal); negative is forgetting.
        forward_transfer: mean over tasks after the first of (row before the task's own stage - score before training).
        forgetting: mean over tasks before the last of (best earlier row - last row).
        learning_accuracy: mean of the diagonal: how well each task was learned just after its stage.
        forgetting_by_task: forgetting of each task; None for the last task and where not measured.
        intervals: (low, high) of each metric, by its name; empty without per-example scores.
        num_tasks: tasks learned so far.
    """

    average_accuracy: Score
    backward_transfer: Score
    forward_transfer: Score
    forgetting: Score
    learning_accuracy: Score
    forgetting_by_task: list[Score]
    num_tasks: int
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON values, for journals and scorecards."""
        return asdict(self)


METRICS = ("average_accuracy", "backward_transfer", "forward_transfer", "forgetting", "learning_accuracy")


def transfer_metrics(matrix: Matrix, baseline: Sequence[Score] | None = None) -> TransferMetrics:
    """Metrics of an accuracy matrix; `baseline[j]` is task j's score before any training.

    Raises:
        DataError: no rows, rows of different lengths, or more rows than tasks.
    """
    _check(matrix, baseline)
    last = len(matrix) - 1
    forgetting: list[Score] = [_forgetting(matrix, task) for task in range(last)]
    return TransferMetrics(
        average_accuracy=_mean([matrix[last][task] for task in range(last + 1)]),
        backward_transfer=_mean([_minus(matrix[last][task], matrix[task][task]) for task in range(last)]),
        forward_transfer=_mean(
            [_minus(matrix[task - 1][task], baseline[task]) for task in range(1, last + 1)] if baseline else []
        ),
        forgetting=_mean(forgetting),
        learning_accuracy=_mean([matrix[task][task] for task in range(last + 1)]),
        forgetting_by_task=[*forgetting, None],
        num_tasks=last + 1,
    )


def bootstrap_transfer(
    scores: ExampleScores,
    baseline: Sequence[Sequence[float] | None] | None = None,
    *,
    weights: Sequence[Sequence[float] | None] | None = None,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> TransferMetrics:
    """Metrics with percentile intervals over examples: `scores[i][j]` holds the score of each example of task j.

    `weights[j]` are the weights of task j's examples in its mean, for example the tokens behind each loss; None: all equal.

    Raises:
        DataError: as `transfer_metrics`, or a task whose stages were scored on different numbers of examples.
    """
    _check(scores, baseline)
    sizes = _example_counts(scores, baseline)
    shares = [None] * len(sizes) if weights is None else list(weights)
    generator = random.Random(seed)
    draws: dict[str, list[float]] = {name: [] for name in METRICS}
    for _ in range(num_resamples):
        picks = [generator.choices(range(size), k=size) if size else [] for size in sizes]
        rows = [_picked_means(row, picks, shares) for row in scores]
        first = None if baseline is None else _picked_means(baseline, picks, shares)
        metrics = transfer_metrics(rows, first)
        for name in METRICS:
            value = getattr(metrics, name)
            if value is not None:
                draws[name].append(value)
    everything = [range(size) for size in sizes]
    whole = transfer_metrics(
        [_picked_means(row, everything, shares) for row in scores],
        None if baseline is None else _picked_means(baseline, everything, shares),
    )
    tail = (1.0 - confidence) / 2
    intervals = {
        name: (quantile(values, tail), quantile(values, 1.0 - tail)) for name, values in draws.items() if values
    }
    return TransferMetrics(**{**_shallow(whole), "intervals": intervals})


def bootstrap_mean(
    scores: Sequence[float], *, num_resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of one task's example scores."""
    if not scores:
        raise DataError("no example scores", allowed="at least one score", action="evaluate the task first")
    generator = random.Random(seed)
    size = len(scores)
    means = [sum(generator.choices(scores, k=size)) / size for _ in range(num_resamples)]
    tail = (1.0 - confidence) / 2
    return quantile(means, tail), quantile(means, 1.0 - tail)


def quantile(values: Sequence[float], share: float) -> float:
    """Linear-interpolated quantile of at least one value."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _forgetting(matrix: Matrix, task: int) -> Score:
    last = len(matrix) - 1
    # Every earlier row counts, also those before the task's own stage, as in the paper's max over l < k.
    earlier = [row[task] for row in matrix[:last]]
    measured = [value for value in earlier if value is not None]
    return _minus(max(measured), matrix[last][task]) if measured else None


def _minus(a: Score, b: Score) -> Score:
    return None if a is None or b is None else a - b


def _mean(values: Sequence[Score]) -> Score:
    measured = [value for value in values if value is not None]
    return sum(measured) / len(measured) if measured else None


def _picked_means(
    row: Sequence[Sequence[float] | None],
    picks: Sequence[Sequence[int]],
    weights: Sequence[Sequence[float] | None],
) -> list[Score]:
    """Mean of each task over the picked examples; None where the task was not measured."""
    return [
        _weighted_mean(cell, chosen, weight) if cell else None
        for cell, chosen, weight in zip(row, picks, weights, strict=True)
    ]


def _weighted_mean(cell: Sequence[float], picks: Sequence[int], weights: Sequence[float] | None) -> float:
    if weights is None:
        return sum([cell[i] for i in picks]) / len(picks)
    return sum([cell[i] * weights[i] for i in picks]) / sum([weights[i] for i in picks])


def _shallow(metrics: TransferMetrics) -> dict[str, Any]:
    return {name: getattr(metrics, name) for name in metrics.__dataclass_fields__}


def _check(matrix: Sequence[Sequence[Any]], baseline: Sequence[Any] | None) -> None:
    widths = {len(row) for row in matrix}
    if not matrix or len(widths) != 1 or len(matrix) > next(iter(widths)):
        raise DataError(
            f"an accuracy matrix of {len(matrix)} rows with {sorted(widths)} columns",
            allowed="one row a finished stage, one column a task, at most as many rows as columns",
            action="evaluate every task after every stage",
        )
    if baseline is not None and len(baseline) != next(iter(widths)):
        raise DataError(
            f"{len(baseline)} scores before training for {next(iter(widths))} tasks",
            allowed="one score (or null) for each task",
            action="evaluate every task before training",
        )


def _example_counts(scores: ExampleScores, baseline: Sequence[Sequence[float] | None] | None) -> list[int]:
    rows = [*scores, *([baseline] if baseline is not None else [])]
    counts = []
    for task in range(len(scores[0])):
        sizes = {len(row[task] or ()) for row in rows if row[task]}
        if len(sizes) > 1:
            raise DataError(
                f"task {task} was scored on {sorted(sizes)} examples in different stages",
                allowed="the same examples after every stage",
                action="evaluate again with one limit and one seed",
            )
        counts.append(sizes.pop() if sizes else 0)
    return counts
