"""Scorecard: every task after every stage, with conditions, transfer, references, contamination, cost. Typed and versioned.

Pure: plain values in, one `Scorecard` out; `scorecard_markdown`, `scorecard_html` and `figures` show it. A score that was
not measured is None with a reason everywhere, never 0. Losses enter the transfer metrics negated, so that higher is better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from hsmn_dist.continual.transfer import bootstrap_transfer, transfer_metrics
from hsmn_dist.evaluation.task_result import TaskResult
from hsmn_dist.foundation.errors import DataError

SCHEMA_VERSION = 1

Score = float | None
Results = Mapping[str, TaskResult]


@dataclass(frozen=True)
class StageLine:
    """One stage of the training, as far as it is known.

    Attributes:
        name: stage, which is also the name of the task that it trained, or "joint".
        steps: optimizer steps.
        target_tokens: tokens trained on.
        seconds: wall time of the training.
        first_validation_loss: before the first step, or the first one measured, nats per token.
        best_validation_loss: of the weights that were kept.
        extra: whatever else the run wrote (stop reason, Fisher estimator, restarts).
    """

    name: str
    steps: int | None = None
    target_tokens: int | None = None
    seconds: float | None = None
    first_validation_loss: float | None = None
    best_validation_loss: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scorecard:
    """Everything that the pages show. `results[i][j]` is task j after stage i, as TaskResult JSON without example scores.

    Attributes:
        run: identity and conditions: run_id, family, num_parameters, config_digest, git_commit, packages, device ...
        score_matrix: main scores in [0, 1].
        loss_matrix: nats per target token.
        transfer_scores: TransferMetrics of `score_matrix`, with intervals.
        transfer_losses: TransferMetrics of the negated `loss_matrix`, with intervals.
        references: rows of reference_scores.yaml whose benchmark is one of the tasks' datasets.
        contamination: task -> {"status": "measured" or "not measured", ...counts}.
        reproduce: commands that give these numbers again.
    """

    run: dict[str, Any]
    tasks: list[str]
    stages: list[StageLine]
    baseline: list[dict[str, Any] | None]
    results: list[list[dict[str, Any] | None]]
    score_matrix: list[list[Score]]
    loss_matrix: list[list[Score]]
    baseline_scores: list[Score]
    baseline_losses: list[Score]
    average_of_all_tasks: Score
    transfer_scores: dict[str, Any] | None
    transfer_losses: dict[str, Any] | None
    references: list[dict[str, Any]] = field(default_factory=list)
    contamination: dict[str, dict[str, Any]] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    reproduce: list[str] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Scorecard:
        """Inverse of `to_json`.

        Raises:
            DataError: another schema version, or fields that are not there.
        """
        version = value.get("schema_version")
        names = {key.name for key in fields(cls)}
        missing = sorted(names - set(value) - {"schema_version"})
        if version != SCHEMA_VERSION or missing:
            raise DataError(
                f"a scorecard of schema version {version!r}" + (f" without {', '.join(missing)}" if missing else ""),
                allowed=f"schema version {SCHEMA_VERSION}",
                action="write it again from the run folder: `hsmn-dist scorecard RUN`",
            )
        known = {key: value[key] for key in names}
        return cls(**{**known, "stages": [StageLine(**line) for line in value["stages"]]})

    def final(self, task: str) -> dict[str, Any] | None:
        """The task's result after the last stage."""
        return self.results[-1][self.tasks.index(task)] if self.results else None


def build_scorecard(
    run: Mapping[str, Any],
    stages: Sequence[StageLine],
    results: Sequence[Results],
    baseline: Results | None = None,
    references: Sequence[Mapping[str, Any]] = (),
    contamination: Mapping[str, Mapping[str, Any]] | None = None,
    reproduce: Sequence[str] = (),
    bootstrap_samples: int = 1000,
) -> Scorecard:
    """Put a run's results together.

    Args:
        run: see `Scorecard.run`; `datasets` ({task: [dataset names]}) decides which references are shown.
        stages: stages in training order.
        results: after each stage, task -> result; a task that is absent was not measured.
        baseline: results before any training.
        references: rows {benchmark, model, score, metric, split, shots, source, date, verification ...}.
        contamination: task -> counts; a task without an entry is "not measured".
        reproduce: commands.
        bootstrap_samples: resamples of the transfer intervals; 0 leaves them out.

    Raises:
        DataError: no results, or more rows than stages.
    """
    if not results or len(results) != len(stages):
        raise DataError(
            f"a scorecard of {len(stages)} stages with {len(results)} rows of results",
            allowed="one row of results for each stage, at least one",
            action="let the run finish a stage, then write the scorecard again",
        )
    tasks = list(dict.fromkeys(task for row in results for task in row))
    scores = [[_score(row.get(task)) for task in tasks] for row in results]
    losses = [[_loss(row.get(task)) for task in tasks] for row in results]
    first = baseline or {}
    measured = [score for score in scores[-1] if score is not None]
    return Scorecard(
        run=dict(run),
        tasks=tasks,
        stages=list(stages),
        baseline=[_compact(first.get(task)) for task in tasks],
        results=[[_compact(row.get(task)) for task in tasks] for row in results],
        score_matrix=scores,
        loss_matrix=losses,
        baseline_scores=[_score(first.get(task)) for task in tasks],
        baseline_losses=[_loss(first.get(task)) for task in tasks],
        average_of_all_tasks=sum(measured) / len(measured) if measured else None,
        transfer_scores=_score_transfer(tasks, results, first, bootstrap_samples),
        transfer_losses=_loss_transfer(tasks, results, first, bootstrap_samples),
        references=_matching(references, run.get("datasets", {}), tasks),
        contamination={task: dict((contamination or {}).get(task, {"status": "not measured"})) for task in tasks},
        cost=_cost(run, stages),
        reproduce=list(reproduce),
    )


def _score(result: TaskResult | None) -> Score:
    return None if result is None else result.score


def _loss(result: TaskResult | None) -> Score:
    return None if result is None else result.nll_per_token


def _compact(result: TaskResult | None) -> dict[str, Any] | None:
    return None if result is None else result.to_json(with_examples=False)


def _score_transfer(
    tasks: Sequence[str], results: Sequence[Results], baseline: Results, bootstrap_samples: int
) -> dict[str, Any] | None:
    """Transfer of the scores; with intervals where every stage scored the same examples of a task."""
    if len(results) > len(tasks):
        return None
    if not bootstrap_samples or not _same_examples(tasks, results, baseline, lambda result: result.example_ids):
        first = [_score(baseline.get(task)) for task in tasks] if baseline else None
        return transfer_metrics([[_score(row.get(task)) for task in tasks] for row in results], first).to_json()
    cells, before = _cells(tasks, results, baseline, lambda result: result.example_scores)
    return bootstrap_transfer(cells, before, num_resamples=bootstrap_samples).to_json()


def _loss_transfer(
    tasks: Sequence[str], results: Sequence[Results], baseline: Results, bootstrap_samples: int
) -> dict[str, Any] | None:
    """Transfer of the negated losses; an example counts in its task's mean by its target tokens, also when it is drawn."""
    if len(results) > len(tasks):
        return None
    losses = [[_negated(_loss(row.get(task))) for task in tasks] for row in results]
    before = [_negated(_loss(baseline.get(task))) for task in tasks]
    has_baseline = any(value is not None for value in before)
    measured = [row[task] for row in [*results, baseline] for task in tasks if task in row]
    is_complete = all(result.loss_values for result in measured if result.nll_per_token is not None)
    same = _same_examples(tasks, results, baseline, lambda result: [result.loss_ids, result.loss_tokens])
    if not bootstrap_samples or not is_complete or not same:
        return transfer_metrics(losses, before if has_baseline else None).to_json()
    cells, first = _cells(tasks, results, baseline, lambda result: [-value for value in result.loss_values])
    weights = [next((row[task].loss_tokens for row in results if task in row), None) for task in tasks]
    first = first if has_baseline else None
    return bootstrap_transfer(cells, first, weights=weights, num_resamples=bootstrap_samples).to_json()


def _same_examples(
    tasks: Sequence[str], results: Sequence[Results], baseline: Results, examples: Callable[[TaskResult], list[Any]]
) -> bool:
    """Whether a task was measured on the same examples after every stage, so that one draw serves all of them."""
    rows = [*results, baseline]
    return all(len({repr(examples(row[task])) for row in rows if task in row}) <= 1 for task in tasks)


def _cells(
    tasks: Sequence[str], results: Sequence[Results], baseline: Results, values: Callable[[TaskResult], list[float]]
) -> tuple[list[list[list[float] | None]], list[list[float] | None] | None]:
    """Each example's value by stage and task, and those before training; None where a task was not measured."""

    def of(row: Results) -> list[list[float] | None]:
        return [values(row[task]) or None if task in row else None for task in tasks]

    return [of(row) for row in results], of(baseline) if baseline else None


def _negated(value: Score) -> Score:
    return None if value is None else -value


def _matching(
    references: Sequence[Mapping[str, Any]], datasets: Mapping[str, Sequence[str]], tasks: Sequence[str]
) -> list[dict[str, Any]]:
    names = {name for task in tasks for name in datasets.get(task, [task])}
    return [dict(row) for row in references if row.get("benchmark") in names]


def _cost(run: Mapping[str, Any], stages: Sequence[StageLine]) -> dict[str, Any]:
    tokens = [stage.target_tokens for stage in stages if stage.target_tokens is not None]
    seconds = [stage.seconds for stage in stages if stage.seconds is not None]
    ranks = run.get("world_size")
    hours = sum(seconds) / 3600 if seconds else None
    return {
        "target_tokens": sum(tokens) if tokens else None,
        "wall_hours": hours,
        "device_hours": hours * ranks if hours is not None and ranks else None,
        "device": run.get("device"),
        "world_size": ranks,
    }
