"""hsmn-dist slurm: the batch script of a run, filled in, on standard output."""

from __future__ import annotations

from pathlib import Path

import typer

from hsmn_dist.foundation.errors import ConfigError

EXAMPLE = "Example: hsmn-dist slurm configs/runs/hope_large_builtin_multi_node.yaml --partition gpu > job.sbatch && sbatch job.sbatch"


def command(
    config: Path = typer.Argument(help="Run configuration (YAML), as the nodes see it."),
    kind: str = typer.Option(
        "", help="one_node, many_nodes or preemptible; from the configuration's nodes when absent."
    ),
    time_limit: str = typer.Option("24:00:00", help="Slurm's --time."),
    partition: str = typer.Option("", help="Slurm's --partition."),
    account: str = typer.Option("", help="Slurm's --account."),
    qos: str = typer.Option("", help="Slurm's --qos."),
    setup: str = typer.Option(". .venv/bin/activate", help="Shell line that makes hsmn-dist and ray available."),
    container: str = typer.Option("", help="Apptainer image to run everything in (then give --setup '')."),
    mlflow_uri: str = typer.Option("", help="MLflow server that the nodes reach."),
    signal_seconds: int = typer.Option(300, min=60, help="Checkpoint and requeue this long before the time limit."),
    array: str = typer.Option(
        "", help="Slurm's --array, for studies: task i runs with seed + i under a name of its own."
    ),
) -> None:
    """Print the sbatch script: one Ray cluster per allocation, TERM and USR1 handled, requeue resumes the run."""
    from hsmn_dist.config.load import load_run_config
    from hsmn_dist.orchestration.slurm_script import KINDS, SlurmSettings, slurm_script

    settings = load_run_config(config)
    chosen = kind or ("one_node" if settings.cluster.num_nodes == 1 else "many_nodes")
    if chosen not in KINDS:
        raise ConfigError(f"--kind {chosen}", allowed=", ".join(KINDS), action="choose one of them")
    filled = SlurmSettings(
        kind=chosen,
        time_limit=time_limit,
        partition=partition,
        account=account,
        qos=qos,
        setup=setup,
        container=container,
        mlflow_uri=mlflow_uri,
        signal_seconds=signal_seconds,
        array=array,
    )
    typer.echo(slurm_script(settings, str(config), filled), nl=False)
