"""From a run folder to its scorecard, figures and the parent run of the tracker. Reads files alone, so it can be done again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hsmn_dist.config.data import DataConfig
from hsmn_dist.config.load import config_digest
from hsmn_dist.config.run import RunConfig
from hsmn_dist.continual.transfer import transfer_metrics
from hsmn_dist.data.contamination import ContaminationReport
from hsmn_dist.data.shards.index import ShardIndex
from hsmn_dist.data.shards.reader import read_index
from hsmn_dist.data.shards.remote import is_url
from hsmn_dist.evaluation.figures import loss_figure, matrix_figure
from hsmn_dist.evaluation.reference_scores import reference_rows
from hsmn_dist.evaluation.scorecard import Scorecard, StageLine, build_scorecard
from hsmn_dist.evaluation.scorecard_files import write_scorecard
from hsmn_dist.evaluation.task_result import TaskResult
from hsmn_dist.foundation.errors import CheckpointError, DataError
from hsmn_dist.foundation.files import read_json
from hsmn_dist.foundation.log import logger
from hsmn_dist.orchestration.attempt import check_attempt, present_attempt
from hsmn_dist.orchestration.curriculum import load_stored_config
from hsmn_dist.orchestration.run_folder import RunFolder, resume_command
from hsmn_dist.orchestration.served_model import log_final_model
from hsmn_dist.orchestration.stage import training_stages
from hsmn_dist.tracking import metric_names
from hsmn_dist.tracking.build import TrackedRun, build_tracker
from hsmn_dist.tracking.jsonl_tracker import read_series
from hsmn_dist.tracking.tracker import FencedTracker, Tracker

log = logger(__name__)

TRANSFER_NAMES = {
    "average_accuracy": metric_names.TRANSFER_AVERAGE_ACCURACY,
    "backward_transfer": metric_names.TRANSFER_BACKWARD,
    "forward_transfer": metric_names.TRANSFER_FORWARD,
    "forgetting": metric_names.TRANSFER_FORGETTING,
}


def run_tags(config: RunConfig, folder: RunFolder) -> dict[str, str]:
    """Searchable labels of the parent run and its stages."""
    origin = read_json(folder.provenance)
    return {
        "family": config.model.family,
        "method": config.continual.method,
        "git_commit": origin["git_commit"],
        "config_digest": config_digest(config)[:16],
        "cluster": f"{config.cluster.num_nodes}x{config.cluster.ranks_per_node} {config.cluster.device}",
    }


def open_parent_tracker(config: RunConfig, folder: RunFolder) -> Tracker:
    """The tracker of the curriculum as a whole, with the run's settings logged. It is written while its attempt owns the run."""
    tracked = TrackedRun(folder.root, folder.path, folder.run_id, tags=run_tags(config, folder))
    attempt = present_attempt(folder)
    tracker = FencedTracker(build_tracker(config.tracking, tracked), lambda: check_attempt(folder, attempt))
    tracker.log_params(config.model_dump(mode="json", exclude={"curriculum", "tracking"}))
    tracker.log_artifact(folder.config)
    return tracker


def finished_results(config: RunConfig, folder: RunFolder) -> list[dict[str, Any]]:
    """`results.json` of every complete stage, in order, up to the first that is not complete."""
    results = []
    for index, stage in enumerate(training_stages(config)):
        stage_folder = folder.stage(index, stage.name)
        if not stage_folder.is_complete:
            break
        results.append(read_json(stage_folder.results))
    return results


def scorecard_of(folder: RunFolder) -> Scorecard:
    """The scorecard of what is finished of a run.

    Raises:
        CheckpointError: no stage is complete.
    """
    config = load_stored_config(folder)
    results = finished_results(config, folder)
    if not results:
        raise CheckpointError(
            f"run {folder.run_id} has no complete stage",
            allowed="a run with at least one stage that has its COMPLETE manifest",
            action=resume_command(folder),
        )
    baseline = read_json(folder.baseline)["tasks"] if folder.baseline.is_file() else None
    facts = _run_facts(config, folder, results)
    return build_scorecard(
        facts,
        [_stage_line(result) for result in results],
        [_task_results(result["tasks"]) for result in results],
        None if baseline is None else _task_results(baseline),
        references=reference_rows({name for names in facts["datasets"].values() for name in names}),
        contamination=_contamination(folder, config.data, facts["datasets"]),
        reproduce=[f"hsmn-dist run {folder.config}", f"hsmn-dist scorecard {folder.run_id}"],
        bootstrap_samples=config.evaluation.bootstrap_samples,
    )


def write_report(folder: RunFolder, tracker: Tracker) -> None:
    """Scorecard (JSON, Markdown, HTML, PNG) and figures into the run folder and the tracker."""
    card = scorecard_of(folder)
    config = load_stored_config(folder)
    figures = folder.path / "figures"
    figures.mkdir(exist_ok=True)
    series = {
        stage.name: read_series(folder.stage(index, stage.name).metrics)
        for index, stage in enumerate(training_stages(config)[: len(card.stages)])
    }
    pictures = [
        matrix_figure(card, figures / "accuracy_matrix.png"),
        loss_figure(series, figures / "losses.png"),
    ]
    written = write_scorecard(card, folder.path)
    for picture in [*pictures, written["png"]]:
        tracker.log_figure(picture)
    for path in written.values():
        tracker.log_artifact(path)
    for name, place in read_json(folder.prepared)["folders"].items():
        index = _index_of(place, config.data)
        if index is None:
            continue
        tracker.log_dataset(name, index.config_digest, str(index.notes.get("origin", {}).get("source", name)))
    for stage, values in enumerate(stage_values(card)):
        tracker.log_metrics(values, stage)
    log_final_model(config, folder, run_tags(config, folder))


def stage_values(card: Scorecard) -> list[dict[str, float]]:
    """After each finished stage: the score and loss of every task, and the transfer numbers up to there."""
    before = card.baseline_scores if any(entry is not None for entry in card.baseline) else None
    return [
        _transfer_values(card.score_matrix[: stage + 1], before) | _task_values(card.tasks, results)
        for stage, results in enumerate(card.results)
    ]


def _transfer_values(
    matrix: Sequence[Sequence[float | None]], before: Sequence[float | None] | None
) -> dict[str, float]:
    if len(matrix) > len(matrix[0]):
        return {}  # more stages than tasks have no transfer
    found = transfer_metrics(matrix, before).to_json()
    return {name: float(found[key]) for key, name in TRANSFER_NAMES.items() if found.get(key) is not None}


def _task_values(tasks: Sequence[str], results: Sequence[dict[str, Any] | None]) -> dict[str, float]:
    values = {}
    for task, result in zip(tasks, results, strict=True):
        if result is not None and result["score"] is not None:
            values[metric_names.task_score(task, result["metric"])] = result["score"]
        if result is not None and result["nll_per_token"] is not None:
            values[metric_names.task_loss(task)] = result["nll_per_token"]
    return values


def _run_facts(config: RunConfig, folder: RunFolder, results: list[dict[str, Any]]) -> dict[str, Any]:
    origin = read_json(folder.provenance)
    return {
        "run_id": folder.run_id,
        "family": config.model.family,
        "num_parameters": results[0]["training"].get("num_parameters"),
        "method": config.continual.method,
        "strength": config.continual.strength,
        "estimator": config.continual.fisher.estimator,
        "seed": config.seed,
        "zero_stage": config.training.zero_stage,
        "precision": config.training.precision,
        "device": config.cluster.device_name or config.cluster.device,
        "world_size": config.cluster.num_nodes * config.cluster.ranks_per_node,
        "config_digest": origin["config_digest"],
        "git_commit": origin["git_commit"],
        "packages": origin["packages"],
        "created": origin["created"],
        "datasets": {stage.name: [dataset.key for dataset in stage.datasets] for stage in config.curriculum.stages},
    }


def _stage_line(result: dict[str, Any]) -> StageLine:
    training = result["training"]
    known = {"steps", "target_tokens", "seconds", "first_validation_loss", "best_validation_loss", "num_parameters"}
    return StageLine(
        name=result["stage"],
        steps=training.get("steps"),
        target_tokens=training.get("target_tokens"),
        seconds=training.get("seconds"),
        first_validation_loss=training.get("first_validation_loss"),
        best_validation_loss=training.get("best_validation_loss"),
        extra={key: value for key, value in training.items() if key not in known},
    )


def _task_results(tasks: dict[str, Any]) -> dict[str, TaskResult]:
    return {name: TaskResult.from_json(value) for name, value in tasks.items()}


def _contamination(folder: RunFolder, data: DataConfig, datasets: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Task -> what the index of its datasets says of test items found in training examples."""
    folders = read_json(folder.prepared)["folders"]
    found: dict[str, dict[str, Any]] = {}
    for task, names in datasets.items():
        indexes = {name: _index_of(folders[name], data) for name in names}
        reports = {name: index and index.notes.get("contamination") for name, index in indexes.items()}
        entries = {
            name: ContaminationReport.from_json(report).scorecard_entry() for name, report in reports.items() if report
        }
        if len(entries) == 1 == len(names):
            found[task] = entries[names[0]]
        elif entries:
            found[task] = {
                "status": "measured",
                **{
                    f"{name}.{key}": value
                    for name, entry in entries.items()
                    for key, value in entry.items()
                    if key != "status"
                },
            }
    return found


def _index_of(place: str, data: DataConfig) -> ShardIndex | None:
    """The index of a prepared folder; None of one at a URL that cannot be reached now: a finished run is reported all the same."""
    try:
        return read_index(place, data)
    except DataError as error:
        if not is_url(place):
            raise
        log.warning("%s is left out of the report: %s", place, error.found)
        return None
