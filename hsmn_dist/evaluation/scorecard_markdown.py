"""The scorecard as Markdown: what a terminal and a repository page show."""

from __future__ import annotations

from collections.abc import Sequence

from hsmn_dist.evaluation import scorecard_text as words
from hsmn_dist.evaluation.markdown import markdown_table
from hsmn_dist.evaluation.scorecard import Scorecard


def scorecard_markdown(card: Scorecard) -> str:
    """The whole page."""
    parts = [f"# Scorecard of {card.run.get('run_id', 'a run')}", markdown_table(("", ""), words.run_rows(card))]
    parts += ["## Tasks after the last stage", _final_table(card)]
    parts += [
        "## Score of every task after every stage (percent)",
        _matrix(card, card.score_matrix, card.baseline_scores),
    ]
    parts += ["## Loss of every task after every stage (nats per target token)"]
    parts += [_matrix(card, card.loss_matrix, card.baseline_losses, is_loss=True)]
    parts += ["## Transfer", markdown_table(("", "by score (points)", "by loss (nats)"), words.transfer_rows(card))]
    parts += [
        "Differences: higher is better; forgetting: lower is better. Brackets are 95 percent intervals over examples."
    ]
    parts += ["## Training", _stage_table(card)]
    parts += ["## Other models", _reference_table(card) if card.references else words.NO_REFERENCES]
    rows = [(task, words.contamination_text(entry)) for task, entry in card.contamination.items()]
    parts += ["## Test examples found in training data", markdown_table(("task", "found"), rows)]
    parts += ["## Cost", markdown_table(("", ""), words.cost_rows(card))]
    if card.reproduce:
        parts += ["## How to get these numbers again", "```\n" + "\n".join(card.reproduce) + "\n```"]
    return "\n\n".join(parts) + "\n"


def _final_table(card: Scorecard) -> str:
    rows = []
    for task in card.tasks:
        result = card.final(task)
        if result is None:
            rows.append((task, words.NOT_MEASURED, "", "", "", ""))
            continue
        extra = ", ".join(f"{name} {100 * value:.1f}" for name, value in result["extra"].items())
        loss = words.nats(result["nll_per_token"])
        rows.append((task, result["metric"], words.with_interval(result), extra, loss, words.conditions_text(result)))
    return markdown_table(("task", "metric", "score (percent)", "also", "loss (nats)", "conditions"), rows)


def _matrix(
    card: Scorecard, matrix: Sequence[Sequence[float | None]], baseline: Sequence[float | None], is_loss: bool = False
) -> str:
    show = words.nats if is_loss else words.percent
    rows = []
    if any(value is not None for value in baseline):
        rows.append(("before training", *map(show, baseline)))
    rows += [(f"after {stage.name}", *map(show, row)) for stage, row in zip(card.stages, matrix, strict=True)]
    return markdown_table(("", *card.tasks), rows)


def _stage_table(card: Scorecard) -> str:
    return markdown_table(words.STAGE_COLUMNS, words.stage_rows(card))


def _reference_table(card: Scorecard) -> str:
    return markdown_table(
        ("benchmark", "model", "score (percent)", "conditions", "status and source"), words.comparison_rows(card)
    )
