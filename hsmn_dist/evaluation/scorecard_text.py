"""How numbers read on every page: percentages, intervals, "not measured", transfer rows. Shared by Markdown and HTML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hsmn_dist.evaluation.scorecard import Scorecard
from hsmn_dist.foundation.units import format_count, format_seconds

NOT_MEASURED = "not measured"
TRANSFER_LABELS = {
    "average_accuracy": "Average over the tasks learned (ACC)",
    "backward_transfer": "Backward transfer (BWT)",
    "forward_transfer": "Forward transfer (FWT)",
    "forgetting": "Forgetting (FM)",
    "learning_accuracy": "Just after each task's own stage",
}


def percent(score: float | None) -> str:
    """A score in percent with one digit, or "not measured"."""
    return NOT_MEASURED if score is None else f"{100 * score:.1f}"


def nats(loss: float | None) -> str:
    """A loss with three digits, or "not measured"."""
    return NOT_MEASURED if loss is None else f"{loss:.3f}"


def with_interval(result: Mapping[str, Any]) -> str:
    """`41.2 [33.0, 50.1]`, or "not measured" with the reason."""
    if result["score"] is None:
        return f"{NOT_MEASURED}: {result['reason']}" if result["reason"] else NOT_MEASURED
    interval = result.get("interval")
    tail = f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else ""
    return f"{100 * result['score']:.1f}{tail}"


def transfer_rows(card: Scorecard) -> list[tuple[str, str, str]]:
    """(name, by score in points, by loss in nats), with intervals where there are any."""
    rows = []
    for key, label in TRANSFER_LABELS.items():
        by_score = _transfer_cell(card.transfer_scores, key, 100.0, 1)
        # Losses were negated; ACC and the diagonal are shown as plain losses again, differences keep "higher is better".
        is_level = key in ("average_accuracy", "learning_accuracy")
        by_loss = _transfer_cell(card.transfer_losses, key, -1.0 if is_level else 1.0, 3)
        rows.append((label, by_score, by_loss))
    return rows


def _transfer_cell(metrics: Mapping[str, Any] | None, key: str, factor: float, digits: int) -> str:
    value = None if metrics is None else metrics.get(key)
    if value is None or metrics is None:
        return NOT_MEASURED
    sign = "+" if key in ("backward_transfer", "forward_transfer") else ""
    text = f"{factor * value:{sign}.{digits}f}"
    interval = (metrics.get("intervals") or {}).get(key)
    if interval:
        low, high = sorted(factor * end for end in interval)
        text += f" [{low:.{digits}f}, {high:.{digits}f}]"
    return text


def conditions_text(result: Mapping[str, Any]) -> str:
    """The conditions of a score in one line."""
    parts = [f"{key} {value}" for key, value in result["conditions"].items()]
    return "; ".join([f"{result['num_examples']} examples", *parts])


def cost_rows(card: Scorecard) -> list[tuple[str, str]]:
    """What the run took."""
    cost = card.cost
    hours, device_hours = cost.get("wall_hours"), cost.get("device_hours")
    tokens = cost.get("target_tokens")
    return [
        ("Target tokens", NOT_MEASURED if tokens is None else format_count(tokens)),
        ("Training time", NOT_MEASURED if hours is None else format_seconds(hours * 3600)),
        ("Device hours", NOT_MEASURED if device_hours is None else f"{device_hours:.3g}"),
        ("Device", f"{cost.get('world_size') or '?'} x {cost.get('device') or 'unknown device'}"),
    ]


STAGE_COLUMNS = ("stage", "steps", "target tokens", "time", "first validation loss", "best validation loss")


def stage_rows(card: Scorecard) -> list[tuple[str, ...]]:
    """One row per stage, in the order of `STAGE_COLUMNS`."""
    return [
        (
            stage.name,
            NOT_MEASURED if stage.steps is None else str(stage.steps),
            NOT_MEASURED if stage.target_tokens is None else format_count(stage.target_tokens),
            NOT_MEASURED if stage.seconds is None else format_seconds(stage.seconds),
            nats(stage.first_validation_loss),
            nats(stage.best_validation_loss),
        )
        for stage in card.stages
    ]


def contamination_text(entry: Mapping[str, Any]) -> str:
    """Status, and the counts where it was measured."""
    if entry.get("status") != "measured":
        return NOT_MEASURED
    counts = [f"{key} {value}" for key, value in entry.items() if key != "status"]
    return "; ".join(counts) or "measured, nothing found"


def run_rows(card: Scorecard) -> list[tuple[str, str]]:
    """Identity and conditions of the run; nested values are left to the JSON."""
    rows = []
    for key, value in card.run.items():
        if isinstance(value, Mapping | list | tuple) or value in (None, ""):
            continue
        text = format_count(value) if key == "num_parameters" else str(value)
        rows.append((key.replace("_", " "), text))
    return rows


NO_REFERENCES = (
    "No score in evaluation/reference_scores.yaml is of one of this run's tasks: nobody else reports the built-in ones."
)


def comparison_rows(card: Scorecard) -> list[tuple[str, str, str, str, str]]:
    """(benchmark, model, score in percent, conditions, status and source): ours first, then what others reported."""
    rows = []
    for benchmark in dict.fromkeys(str(row["benchmark"]) for row in card.references):
        for task in card.tasks:
            result = card.final(task)
            if list(card.run.get("datasets", {}).get(task, [task])) == [benchmark] and result is not None:
                conditions = f"{result['metric']}; {result['conditions'].get('split')}; {result['conditions'].get('shots')} shots"
                limit = f"{result['num_examples']} examples of {card.run.get('run_id', 'this run')}"
                rows.append((benchmark, "this run", with_interval(result), conditions, f"measured; {limit}"))
        for row in card.references:
            if row["benchmark"] == benchmark:
                conditions = f"{row.get('metric', '')}; {row.get('split', '')}; {row.get('shots', '?')} shots"
                rows.append(
                    (benchmark, str(row.get("model")), percent(row.get("score")), conditions, reference_note(row))
                )
    return rows


def reference_note(row: Mapping[str, Any]) -> str:
    """Source, date and how far a reference score can be trusted."""
    parts = [row.get("verification", "unverified"), row.get("source") or "no source", row.get("date") or "no date"]
    return "; ".join(str(part) for part in [*parts, row.get("note")] if part)
