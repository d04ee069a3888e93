"""The report of a study: every variant's end loss, loss just after learning, and forgetting, over seeds. Markdown, JSON, PNG.

Losses (nats per target token) are compared, because small models score 0 on most tasks while their losses already tell methods apart.
The two questions of the study are answered in words with their numbers: does the method forget at most half of what the reference forgets, and
does it learn each new task at most 5 percent worse?
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hsmn_dist.config.study import StudyConfig
from hsmn_dist.evaluation.figures import study_figure
from hsmn_dist.evaluation.scorecard import Scorecard
from hsmn_dist.evaluation.scorecard_files import read_scorecard
from hsmn_dist.foundation.errors import CheckpointError
from hsmn_dist.foundation.files import write_json, write_text
from hsmn_dist.orchestration.study import StudyRun

MAX_FORGETTING_SHARE = 0.5
MAX_LEARNING_RISE = 0.05


@dataclass(frozen=True)
class VariantLine:
    """One variant; each list has one number per finished seed, in the study's order. None where a method has no such number.

    Attributes:
        end_loss: mean over tasks after the last stage.
        learning_loss: mean over tasks just after their own stage.
        forgetting: mean over the earlier tasks of (end loss - lowest loss before).
    """

    variant: str
    seeds: list[int]
    end_loss: list[float]
    learning_loss: list[float] | None
    forgetting: list[float] | None


def variant_line(variant: str, seeds: list[int], cards: list[Scorecard]) -> VariantLine:
    """Numbers of one variant from its scorecards."""
    end = [_mean([value for value in card.loss_matrix[-1] if value is not None]) for card in cards]
    transfers = [card.transfer_losses for card in cards]
    if any(
        transfer is None or len(card.stages) < len(card.tasks) for transfer, card in zip(transfers, cards, strict=True)
    ):
        return VariantLine(variant, seeds, end, None, None)  # joint training has no order, so nothing to forget
    learning = [-float(transfer["learning_accuracy"]) for transfer in transfers if transfer]
    forgetting = [float(transfer["forgetting"]) for transfer in transfers if transfer]
    return VariantLine(variant, seeds, end, learning, forgetting)


def write_study_report(study: StudyConfig, runs: list[StudyRun], folder: Path) -> Path:
    """Write study.md, study.json and study.png of what is complete; returns the Markdown's path.

    Raises:
        CheckpointError: no run is complete.
    """
    lines = []
    for variant in study.variants:
        done = [(run.seed, run.find()) for run in runs if run.variant == variant and run.is_complete]
        cards = [read_scorecard(found.path) for _, found in done if found is not None]
        if cards:
            lines.append(variant_line(variant, [seed for seed, _ in done], cards))
    if not lines:
        raise CheckpointError(
            f"study {study.name}: no run is complete",
            allowed="at least one complete run",
            action="hsmn-dist study FILE",
        )
    folder.mkdir(parents=True, exist_ok=True)
    study_figure({line.variant: (line.end_loss, line.forgetting) for line in lines}, folder / "study.png")
    write_json(folder / "study.json", {"study": study.name, "variants": [asdict(line) for line in lines]})
    write_text(folder / "study.md", _markdown(study, lines))
    return folder / "study.md"


def _markdown(study: StudyConfig, lines: list[VariantLine]) -> str:
    reference = next((line for line in lines if line.variant == study.reference), None)
    rows = [
        f"| {line.variant} | {len(line.seeds)} | {_spread(line.end_loss)} | {_spread(line.learning_loss)} | "
        f"{_spread(line.forgetting)} | {_verdict(line, reference)} |"
        for line in lines
    ]
    best = min(
        (line for line in lines if line.forgetting is not None), key=lambda line: _mean(line.end_loss), default=None
    )
    text = [
        f"# Study {study.name}",
        "",
        "Losses in nats per target token, mean and standard deviation over seeds; lower is better.",
        "",
        "| method | seeds | loss of all tasks at the end | loss just after learning | forgetting | "
        f"against {study.reference} |",
        "| --- | --: | --: | --: | --: | --- |",
        *rows,
        "",
    ]
    if best is not None:
        text.append(f"Lowest end loss of the sequential methods: {best.variant} ({_spread(best.end_loss)}).")
    return "\n".join([*text, "", "![methods](study.png)", ""])


def _verdict(line: VariantLine, reference: VariantLine | None) -> str:
    """The two questions of the study, answered with their numbers."""
    if reference is None or reference.forgetting is None or reference.learning_loss is None:
        return "not measured"
    if line is reference:
        return "the reference"
    if line.forgetting is None or line.learning_loss is None:
        return "no order of tasks"
    share = _mean(line.forgetting) / _mean(reference.forgetting)
    rise = _mean(line.learning_loss) / _mean(reference.learning_loss) - 1
    kept = "yes" if share <= MAX_FORGETTING_SHARE else "no"
    learned = "yes" if rise <= MAX_LEARNING_RISE else "no"
    return (
        f"forgets {100 * share:.0f}% of it (at most half: {kept}); learns {100 * rise:+.1f}% (at most +5%: {learned})"
    )


def _spread(values: list[float] | None) -> str:
    if values is None:
        return "-"
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{_mean(values):.3f} +- {deviation:.3f}"


def _mean(values: list[Any]) -> float:
    return float(statistics.fmean(values))
