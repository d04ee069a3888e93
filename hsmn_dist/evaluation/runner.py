"""evaluate_task: a TextModel and examples in, one TaskResult with its conditions out. Knows no model, tokenizer or rank.

Unusual: the scored examples are spread evenly over those given, so a task that joins several datasets is scored on each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hsmn_dist.config.evaluation import EvaluationConfig
from hsmn_dist.data.example import Example
from hsmn_dist.evaluation import metrics
from hsmn_dist.evaluation.kind_scores import KindScores
from hsmn_dist.evaluation.scorers import SCORERS
from hsmn_dist.evaluation.task_result import TaskResult
from hsmn_dist.foundation.errors import DataError
from hsmn_dist.models.text_model import TextModel

PROMPT_VERSION = "1"
"""Raised whenever contexts, stop strings or extraction change: scores of different versions are not compared."""


def evaluate_task(
    model: TextModel,
    task: str,
    examples: Sequence[Example],
    settings: EvaluationConfig,
    split: str = "test",
    shots: Sequence[Example] = (),
) -> TaskResult:
    """Score `examples` by their kind, and the loss of their targets.

    Args:
        model: answers likelihoods and generates text.
        task: name in every table.
        examples: of one split; `settings.num_examples` of them are scored, `settings.num_loss_examples` give the loss.
        settings: decoding, limits, seed.
        split: written into the conditions.
        shots: solved examples shown before every question, the first `settings.num_shots` of them; of another split.

    Raises:
        DataError: no examples; fewer shots than asked; a shot that is scored itself.
    """
    if not examples:
        raise DataError(
            f"task {task!r}: no examples in its {split} split",
            allowed="at least one example",
            action="prepare more rows, or give the split a larger share (data.split)",
        )
    shots = _checked_shots(task, shots, examples, settings)
    examples = with_shots(examples, shots)
    scored = spread(examples, settings.num_examples)
    by_kind: dict[str, list[int]] = {}
    for index, example in enumerate(scored):
        by_kind.setdefault(example.kind, []).append(index)
    parts = {kind: SCORERS[kind](model, [scored[i] for i in places], settings) for kind, places in by_kind.items()}
    loss_examples = spread(examples, settings.num_loss_examples)
    loss = target_loss(model, loss_examples)
    conditions = _conditions(settings, split, len(examples), parts) | {"shots": len(shots)}
    if shots:
        conditions["shot_ids"] = [shot.id for shot in shots]
    return _assemble(
        task,
        scored,
        by_kind,
        parts,
        settings,
        conditions,
        loss,
    )


SHOT_DELIMITER = "\n\n"
"""Between two shots, and before the question: the delimiter of lm-evaluation-harness."""


def with_shots(examples: Sequence[Example], shots: Sequence[Example]) -> list[Example]:
    """The same questions behind the solved ones; everything that scores them is untouched."""
    prefix = "".join(f"{shot.context}{shot.target}{SHOT_DELIMITER}" for shot in shots)
    return [replace(example, context=prefix + example.context) for example in examples] if prefix else list(examples)


def _checked_shots(
    task: str, shots: Sequence[Example], examples: Sequence[Example], settings: EvaluationConfig
) -> list[Example]:
    shots = list(shots[: settings.num_shots])
    if len(shots) < settings.num_shots:
        raise DataError(
            f"task {task!r}: {len(shots)} shots where evaluation.num_shots asks for {settings.num_shots}",
            allowed="as many solved examples of another split as there are shots",
            action="prepare more training rows, or lower evaluation.num_shots",
        )
    scored = {example.id for example in examples}
    leaked = [shot.id for shot in shots if shot.id in scored]
    if leaked:
        raise DataError(
            f"task {task!r}: example {leaked[0]!r} is a shot and is scored too",
            allowed="shots from another split than the scored examples",
            action="take the shots from the training split",
        )
    return shots


def spread(examples: Sequence[Example], count: int) -> list[Example]:
    """`count` examples at even distances, the first one included; all of them where there are no more."""
    if len(examples) <= count:
        return list(examples)
    return [examples[index * len(examples) // count] for index in range(count)]


def target_loss(model: TextModel, examples: Sequence[Example]) -> dict[str, Any]:
    """The loss fields of a `TaskResult`: of all targets together, and of each example with a target token."""
    results = model.loglikelihood([(example.context, example.target) for example in examples])
    nll = math.fsum(result.nll_sum for result in results)
    tokens, num_bytes = sum(result.num_tokens for result in results), sum(result.num_bytes for result in results)
    counted = [(example, result) for example, result in zip(examples, results, strict=True) if result.num_tokens]
    return {
        "nll_per_token": nll / tokens if tokens else None,
        "bits_per_byte": metrics.bits_per_byte(nll, num_bytes) if num_bytes else None,
        "num_loss_examples": len(examples),
        "loss_ids": [example.id for example, _ in counted],
        "loss_values": [result.nll_sum / result.num_tokens for _, result in counted],
        "loss_tokens": [result.num_tokens for _, result in counted],
    }


def _conditions(settings: EvaluationConfig, split: str, num_given: int, parts: dict[str, KindScores]) -> dict[str, Any]:
    conditions: dict[str, Any] = {
        "split": split,
        "prompt_version": PROMPT_VERSION,
        "selection": f"spread evenly over the first {num_given} examples of the split",
        "temperature": settings.temperature,
        "max_new_tokens": settings.max_new_tokens,
        "seed": settings.seed,
    }
    for kind, part in parts.items():
        prefix = f"{kind}." if len(parts) > 1 else ""
        conditions |= {f"{prefix}{key}": value for key, value in part.conditions.items()}
    return conditions


def _assemble(
    task: str,
    scored: Sequence[Example],
    by_kind: dict[str, list[int]],
    parts: dict[str, KindScores],
    settings: EvaluationConfig,
    conditions: dict[str, Any],
    loss: dict[str, Any],
) -> TaskResult:
    """Put the parts of a task together; with several kinds the main score is the mean over all scored examples."""
    is_mixed = len(parts) > 1
    values: dict[int, float] = {}
    extra: dict[str, float] = {}
    for kind, part in parts.items():
        values |= dict(zip(by_kind[kind], part.values, strict=False))
        prefix = f"{kind}." if is_mixed else ""
        extra |= {f"{prefix}{name}": metrics.mean(found) for name, found in part.extra.items() if found}
        if is_mixed and part.values:
            extra[f"{kind}.{part.metric}"] = metrics.mean(part.values)
    measured = [values[index] for index in sorted(values)]
    metric = "mean_of_kinds" if is_mixed else next(iter(parts.values())).metric
    interval, method = _interval(measured, metric, settings)
    reasons = [f"{kind}: {part.reason}" for kind, part in parts.items() if part.reason]
    return TaskResult(
        task=task,
        kind="mixed" if is_mixed else next(iter(parts)),
        metric=metric,
        status="measured" if measured else "not measured",
        score=metrics.mean(measured) if measured else None,
        num_examples=len(measured),
        conditions=conditions,
        reason="; ".join(reasons),
        interval=interval,
        interval_method=method,
        extra=extra,
        example_ids=[scored[index].id for index in sorted(values)],
        example_scores=measured,
        **loss,
    )


FRACTIONAL_METRICS = ("chrf", "map", "mean_of_kinds")
"""Scores of an example that may lie anywhere between 0 and 1, even where all of them happen to be 0."""


def _interval(values: list[float], metric: str, settings: EvaluationConfig) -> tuple[tuple[float, float] | None, str]:
    if not values or settings.bootstrap_samples == 0:
        return None, ""
    if metric not in FRACTIONAL_METRICS and all(value in (0.0, 1.0) for value in values):
        # The bootstrap of 0 right out of 32 would be [0, 0].
        return metrics.wilson_interval(sum(values), len(values)), "wilson"
    return metrics.bootstrap_interval(values, settings.bootstrap_samples, settings.seed), "bootstrap"
