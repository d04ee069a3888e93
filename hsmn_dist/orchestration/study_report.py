"""The report of a study: every variant's end loss, loss just after learning, and forgetting, over seeds. Markdown, JSON, PNG.

Losses (nats per target token) are compared, because small models score 0 on most tasks while their losses already tell methods apart.
The two questions of the study are answered in words with their numbers: does the method forget at most half of what the reference forgets, and
does it learn each new task at most 5 percent worse? Of the ways of EWC alone (no replay), the report names the best, and says whether
the package's default is that one.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hsmn_dist.config.continual import ContinualConfig
from hsmn_dist.config.study import StudyConfig
from hsmn_dist.evaluation.compare import loss_columns
from hsmn_dist.evaluation.figures import study_figure
from hsmn_dist.evaluation.markdown import markdown_table
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
        variant: its name in the study's file.
        continual: its settings (`continual.` section).
        seeds: those that are complete.
        end_loss: mean over tasks after the last stage.
        learning_loss: mean over tasks just after their own stage.
        forgetting: mean over the earlier tasks of (end loss - lowest loss before).
    """

    variant: str
    continual: ContinualConfig
    seeds: list[int]
    end_loss: list[float]
    learning_loss: list[float] | None
    forgetting: list[float] | None


def variant_line(variant: str, continual: ContinualConfig, seeds: list[int], cards: list[Scorecard]) -> VariantLine:
    """Numbers of one variant from its scorecards."""
    end = [_mean([value for value in card.loss_matrix[-1] if value is not None]) for card in cards]
    columns = [loss_columns(card) for card in cards]
    learning = [column["learning_accuracy"] for column in columns if column is not None]
    forgetting = [column["forgetting"] for column in columns if column is not None]
    has_order = all(len(card.stages) == len(card.tasks) for card in cards)  # joint training has nothing to forget
    if not has_order or len(forgetting) < len(cards) or None in learning or None in forgetting:
        return VariantLine(variant, continual, seeds, end, None, None)
    return VariantLine(variant, continual, seeds, end, learning, forgetting)


def write_study_report(study: StudyConfig, runs: list[StudyRun], folder: Path) -> Path:
    """Write study.md, study.json and study.png of what is complete; returns the Markdown's path.

    Raises:
        CheckpointError: no run is complete.
    """
    lines = []
    for variant in study.variants:
        mine = [run for run in runs if run.variant == variant]
        done = [(run.seed, run.find()) for run in mine if run.is_complete]
        cards = [read_scorecard(found.path) for _, found in done if found is not None]
        if cards:
            lines.append(variant_line(variant, mine[0].config.continual, [seed for seed, _ in done], cards))
    if not lines:
        raise CheckpointError(
            f"study {study.name}: no run is complete",
            allowed="at least one complete run",
            action="hsmn-dist study FILE",
        )
    folder.mkdir(parents=True, exist_ok=True)
    panels: dict[str, dict[str, list[float] | None]] = {
        "loss of all tasks at the end (nats)": {line.variant: line.end_loss for line in lines},
        "loss just after learning (nats)": {line.variant: line.learning_loss for line in lines},
        "forgetting (nats)": {line.variant: line.forgetting for line in lines},
    }
    study_figure(panels, folder / "study.png")
    write_json(
        folder / "study.json",
        {"study": study.name, "variants": [{**asdict(line), "continual": _settings(line)} for line in lines]},
    )
    write_text(folder / "study.md", study_markdown(study, lines))
    return folder / "study.md"


def study_markdown(study: StudyConfig, lines: Sequence[VariantLine]) -> str:
    """The report as Markdown."""
    reference = next((line for line in lines if line.variant == study.reference), None)
    head = ["method", "settings", f"against {study.reference}", "seeds", "loss of all tasks at the end"]
    head += ["loss just after learning", "forgetting"]
    rows = [
        [
            line.variant,
            ", ".join(str(value) for value in _settings(line).values()),
            _verdict(line, reference),
            str(len(line.seeds)),
            _spread(line.end_loss),
            _spread(line.learning_loss),
            _spread(line.forgetting),
        ]
        for line in lines
    ]
    text = [
        f"# Study {study.name}",
        "Losses in nats per target token, mean and standard deviation over seeds; lower is better.",
    ]
    text += [markdown_table(head, rows, num_left=3)]
    ordered = [line for line in lines if line.forgetting is not None]
    if ordered:
        best = min(ordered, key=lambda line: _mean(line.end_loss))
        text.append(f"Lowest end loss of the sequential methods: {best.variant} ({_spread(best.end_loss)}).")
    if any("ewc" in line.continual.method for line in lines):
        text.append(_default_sentence(ordered, reference))
    text.append("![methods](study.png)")
    return "\n\n".join(text) + "\n"


def _settings(line: VariantLine) -> dict[str, Any]:
    """What sets the variant apart, the method's name first."""
    continual = line.continual
    settings: dict[str, Any] = {"method": continual.method}
    if "ewc" in continual.method:
        settings |= {"estimator": continual.fisher.estimator, "application": continual.application}
    if "ewc" in continual.method or continual.method == "l2":
        settings["strength"] = f"{continual.strength:g}"
    return settings


def _default_sentence(lines: Sequence[VariantLine], reference: VariantLine | None) -> str:
    """Which way of EWC alone is the best of those within both limits, and whether it is the package's default.

    Ways whose end loss is within one standard deviation of the lowest count as equal; the one that learns best is named.
    """
    compared = [(line, _shares(line, reference)) for line in lines if line.continual.method == "ewc"]
    within = [line for line, shares in compared if shares is not None and _is_kept(shares) and _is_learned(shares)]
    if not within:
        return "No way of EWC alone is within both limits: the default stays."
    lowest = min(within, key=lambda line: _mean(line.end_loss))
    bound = _mean(lowest.end_loss) + _deviation(lowest.end_loss)
    equal = [line for line in within if _mean(line.end_loss) <= bound]
    best = min(equal, key=lambda line: _mean(line.learning_loss or []))
    default = ContinualConfig()
    mine = (best.continual.fisher.estimator, best.continual.application)
    theirs = (default.fisher.estimator, default.application)
    named = f"estimator `{mine[0]}`, application `{mine[1]}`"
    ways = ", ".join(f"`{line.variant}`" for line in within)
    others = ", ".join(f"`{line.variant}`" for line in equal if line is not best)
    return (
        f"Of the ways of EWC alone that are within both limits ({ways}), `{best.variant}` is the best: end loss {_spread(best.end_loss)}"
        + (f", equal within one standard deviation to that of {others}, and it learns better" if others else "")
        + f". {named[0].upper()}{named[1:]} should be the default, "
        + ("and is." if mine == theirs else f"and the default is estimator `{theirs[0]}`, application `{theirs[1]}`.")
    )


def _shares(line: VariantLine, reference: VariantLine | None) -> tuple[float, float] | None:
    """(forgetting over the reference's, relative rise of the loss just after learning)."""
    if reference is None or reference.forgetting is None or reference.learning_loss is None:
        return None
    if line.forgetting is None or line.learning_loss is None:
        return None
    return (
        _mean(line.forgetting) / _mean(reference.forgetting),
        _mean(line.learning_loss) / _mean(reference.learning_loss) - 1,
    )


def _is_kept(shares: tuple[float, float]) -> bool:
    return shares[0] <= MAX_FORGETTING_SHARE


def _is_learned(shares: tuple[float, float]) -> bool:
    return shares[1] <= MAX_LEARNING_RISE


def _verdict(line: VariantLine, reference: VariantLine | None) -> str:
    """The two questions of the study, answered with their numbers."""
    if line is reference:
        return "the reference"
    if line.forgetting is None:
        return "no order of tasks"
    shares = _shares(line, reference)
    if shares is None:
        return "not measured"
    kept, learned = ("yes" if good else "no" for good in (_is_kept(shares), _is_learned(shares)))
    return (
        f"forgets {round(100 * shares[0])}% of it (at most half: {kept}); "
        f"learns {100 * shares[1]:+.1f}% (at most +5%: {learned})"
    )


def _spread(values: Sequence[float] | None) -> str:
    if values is None:
        return "-"
    return f"{_mean(values):.3f} +- {_deviation(values):.3f}"


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _mean(values: Sequence[Any]) -> float:
    return float(statistics.fmean(values))
