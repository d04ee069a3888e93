"""hsmn-dist prepare: raw rows to tokenized tar shards, for one dataset or for every dataset of a run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from hsmn_dist.foundation.errors import ConfigError

EXAMPLE = (
    "Examples: hsmn-dist prepare --dataset gsm8k --source rows.jsonl --out shards --tokenizer bytes;  "
    "hsmn-dist prepare configs/runs/hsmn_debug_demo_cpu.yaml"
)


def command(
    config: Path | None = typer.Argument(None, help="Run configuration whose datasets are prepared."),
    dataset: str = typer.Option("", help="Name of a built-in or known dataset; it decides the preprocessor."),
    source: str = typer.Option(
        "", help="JSONL, CSV or Parquet file, or a folder of text; empty: built-in rows or the hub."
    ),
    revision: str = typer.Option("", help="Hub revision."),
    out: Path | None = typer.Option(None, help="Folder for the shards of --dataset."),
    tokenizer: str = typer.Option("bytes", help="bytes, bpe, or a tokenizer.json."),
    vocab_size: int = typer.Option(2048, help="Ids of a trained BPE."),
    num_examples: int = typer.Option(0, help="Stop after this many examples; 0 means all."),
    workers: int = typer.Option(1, min=1, help="Processes on this machine."),
    uses_ray: bool = typer.Option(False, "--ray", help="Spread the work over a Ray cluster."),
    ray_address: str = typer.Option("", help="Ray cluster for --ray; a local one is started when absent."),
    assignments: list[str] = typer.Option([], "--set", help="Change one setting of CONFIG."),
) -> None:
    """Turn rows into examples, split them by group, tokenize, and write shards with an index."""
    executor = _executor(uses_ray, ray_address)
    with terminal_progress() as progress:
        if config is not None:
            _prepare_run(config, assignments, progress, executor)
            return
        if not dataset or out is None:
            raise ConfigError(
                "neither a configuration nor --dataset with --out",
                allowed="hsmn-dist prepare CONFIG, or hsmn-dist prepare --dataset NAME --out FOLDER",
                action="name the dataset and the folder",
            )
        from hsmn_dist.config.data import DataConfig, DatasetConfig, TokenizerConfig
        from hsmn_dist.data.prepare import prepare_dataset
        from hsmn_dist.data.shards.reader import verify_folder

        if tokenizer in ("bytes", "bpe"):
            kind, path = tokenizer, ""
        else:
            kind, path = "file", tokenizer
        tokens = TokenizerConfig.model_validate({"kind": kind, "path": path, "vocab_size": max(vocab_size, 260)})
        what = DatasetConfig(name=dataset, source=source, revision=revision, num_examples=num_examples)
        prepare_dataset(what, DataConfig(prepare_workers=workers), tokens, out, progress, executor)
    index = verify_folder(out)
    for split, entry in index.splits.items():
        typer.echo(f"{split}: {sum(shard.num_samples for shard in entry.shards)} samples in {len(entry.shards)} shards")
    for reason, count in index.skipped.get("counts", {}).items():
        typer.echo(f"rows that could not be used, {reason}: {count}")
    typer.echo(f"index: {out / 'index.json'}")


def _prepare_run(config: Path, assignments: list[str], progress: Any, executor: Any) -> None:
    from hsmn_dist.config.load import load_run_config
    from hsmn_dist.data.prepare import prepare_curriculum

    run = load_run_config(config, assignments)
    datasets = [dataset for stage in run.curriculum.stages for dataset in stage.datasets]
    root = Path(run.run_root) / "prepared"
    prepared = prepare_curriculum(datasets, run.data, run.tokenizer, root, progress, executor)
    typer.echo(f"tokenizer: {prepared.tokenizer_path}")
    for name, folder in prepared.folders.items():
        typer.echo(f"{name}: {folder}")


def _executor(uses_ray: bool, address: str) -> Any:
    if not uses_ray:
        return None
    from hsmn_dist.orchestration.ray_executor import RayExecutor

    return RayExecutor(address)


@contextlib.contextmanager
def terminal_progress() -> Iterator[Any]:
    """Bars on a terminal, silence elsewhere."""
    from hsmn_dist.data.progress import QuietProgress, TerminalProgress

    if sys.stderr.isatty():
        with TerminalProgress() as bars:
            yield bars
    else:
        yield QuietProgress()
