"""hsmn-dist evaluate: score the weights of a run on its own tasks, on prepared shards, or on a file of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from hsmn_dist.foundation.errors import ConfigError

EXAMPLE = "Examples: hsmn-dist evaluate latest;  hsmn-dist evaluate RUN --dataset gsm8k=rows.jsonl --num-examples 50 --num-shots 4"


def command(
    run: str = typer.Argument(help="Run id, its beginning or end, a path, `latest`, or a folder of weights."),
    stage: int | None = typer.Option(None, help="Stage whose weights are scored; the newest complete one when absent."),
    task: list[str] = typer.Option(
        [], "--task", "--tasks", help="Task of the run; all of them when absent. May be repeated."
    ),
    dataset: list[str] = typer.Option(
        [],
        metavar="NAME[=FILE]",
        help="Score this dataset instead of the run's tasks, from local rows if a file is named. May be repeated.",
    ),
    source: str = typer.Option("", help="Local rows of a single --dataset; empty: built-in rows or the hub."),
    num_examples: int | None = typer.Option(None, help="Examples per task; the configuration's when absent."),
    max_new_tokens: int | None = typer.Option(None, help="Longest answer; the configuration's when absent."),
    runs_model_code: bool = typer.Option(False, "--run-model-code", help="Run model-written programs in the sandbox."),
    harness: str = typer.Option("", help="`lm-eval` runs --task from that harness instead of the run's tasks."),
    include_path: Path | None = typer.Option(None, help="Folder of task YAML files for --harness (works offline)."),
    num_shots: int | None = typer.Option(
        None,
        help="Solved examples before each question; the configuration's when absent (of --harness: each task's own).",
    ),
    run_root: Path = typer.Option(Path("runs"), help="Folder of runs."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Score weights on test examples and print every score with its conditions."""
    from rich.console import Console
    from rich.progress import track

    from hsmn_dist.config.evaluation import EvaluationConfig
    from hsmn_dist.evaluation.runner import evaluate_task
    from hsmn_dist.orchestration.trained_model import load_trained

    trained = load_trained(run, run_root, stage)
    if harness:
        _run_harness(trained, harness, task, include_path, num_shots, num_examples)
        return
    settings = trained.config.evaluation if trained.config else EvaluationConfig()
    changes: dict[str, Any] = {"runs_model_code": runs_model_code or settings.runs_model_code}
    if num_examples is not None:
        changes |= {"num_examples": num_examples, "num_loss_examples": num_examples}
    if max_new_tokens is not None:
        changes["max_new_tokens"] = max_new_tokens
    if num_shots is not None:
        changes["num_shots"] = num_shots
    settings = EvaluationConfig.model_validate({**settings.model_dump(), **changes})
    model = trained.text_model(settings.batch_examples)
    parts = _dataset_parts(dataset, source, settings) if dataset else _run_parts(trained, task, settings)
    results = []
    console = Console(stderr=True)
    for name, split, examples, shots in track(parts, "evaluating", console=console, disable=not console.is_terminal):
        results.append(evaluate_task(model, name, examples, settings, split, shots).to_json())
    if as_json:
        typer.echo(json.dumps(results, indent=2))
    else:
        _print(results)


def _run_harness(
    trained: Any, harness: str, tasks: list[str], include_path: Path | None, num_shots: int | None, limit: int | None
) -> None:
    """Tasks of lm-evaluation-harness; its result dictionary is printed as JSON."""
    if harness != "lm-eval" or not tasks:
        raise ConfigError(
            f"--harness {harness!r} with {len(tasks)} tasks",
            allowed="--harness lm-eval with at least one --task",
            action="for example: --harness lm-eval --task my_task --include-path tasks",
        )
    from hsmn_dist.evaluation.lm_eval_adapter import run_harness

    result = run_harness(trained.text_model(), tasks, include_path, num_shots, limit)
    typer.echo(
        json.dumps(
            {key: result[key] for key in ("results", "versions", "n-shot") if key in result}, indent=2, default=str
        )
    )


Part = tuple[str, str, list[Any], list[Any]]
"""Task, split, examples, shots."""


def _dataset_parts(datasets: list[str], source: str, settings: Any) -> list[Part]:
    """Rows of datasets named on the command line; the shots are the examples behind those that are scored."""
    from itertools import islice

    from hsmn_dist.config.data import DatasetConfig
    from hsmn_dist.data.builtin import preprocessor_of
    from hsmn_dist.data.preprocessors.base import SkipCounter, require_usable
    from hsmn_dist.data.raw_reader import read_rows

    if source and len(datasets) > 1:
        raise ConfigError(
            f"--source with {len(datasets)} datasets",
            allowed="--source with one --dataset",
            action="name the files beside the datasets: --dataset gsm8k=a.jsonl --dataset sciq=b.jsonl",
        )
    parts: list[Part] = []
    limit = max(settings.num_examples, settings.num_loss_examples)
    for given in datasets:
        name, _, file = given.partition("=")
        skipped = SkipCounter()
        wanted = limit + settings.num_shots
        rows = read_rows(DatasetConfig(name=name, source=file or source, num_examples=wanted))
        examples = list(islice(preprocessor_of(name)(rows, skipped), wanted))
        require_usable(name, len(examples), skipped)
        num_scored = max(1, len(examples) - settings.num_shots)
        parts.append((name, "all", examples[:num_scored], examples[num_scored:]))
    return parts


def _run_parts(trained: Any, tasks: list[str], settings: Any) -> list[Part]:
    """Test examples of the run's tasks, with shots from their training split."""
    if trained.config is None:
        raise ConfigError("weights outside a run have no tasks", allowed="--dataset NAME=FILE", action="name a dataset")
    from hsmn_dist.foundation.files import read_json
    from hsmn_dist.orchestration.stage_evaluation import task_folders, test_examples, training_shots

    folders = task_folders(trained.config, read_json(trained.folder.prepared))
    unknown = [name for name in tasks if name not in folders]
    if unknown:
        raise ConfigError(f"--task {unknown[0]}", allowed=", ".join(folders), action="choose one of the run's tasks")
    data = trained.config.data
    return [
        (
            name,
            "test",
            test_examples(folders[name], settings, data),
            training_shots(folders[name], settings.num_shots, data),
        )
        for name in tasks or list(folders)
    ]


def _print(results: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "metric", "score", "95% interval", "loss", "bits/byte", "examples")
    for result in results:
        score = "not measured" if result["score"] is None else f"{100 * result['score']:.1f}%"
        low_high = result["interval"]
        interval = f"{100 * low_high[0]:.1f} to {100 * low_high[1]:.1f}" if low_high else ""
        loss = f"{result['nll_per_token']:.3f}" if result["nll_per_token"] is not None else ""
        bits = f"{result['bits_per_byte']:.3f}" if result["bits_per_byte"] is not None else ""
        table.add_row(result["task"], result["metric"], score, interval, loss, bits, str(result["num_examples"]))
    Console().print(table)
    for result in results:
        if result["reason"]:
            typer.echo(f"{result['task']}: {result['reason']}")
