"""hsmn-dist slurm: the batch script of a run or of a study, filled in, on standard output."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from hsmn_dist.config.yaml_source import SourceTree
    from hsmn_dist.orchestration.slurm_settings import SlurmSettings

EXAMPLE = "Example: hsmn-dist slurm configs/runs/hope_large_builtin_multi_node.yaml --partition gpu > job.sbatch && sbatch job.sbatch"


def command(
    config: Path = typer.Argument(help="Run configuration or study file (YAML), as the nodes see it."),
    kind: str = typer.Option(
        "", help="one_node, many_nodes or preemptible; from the configuration's nodes when absent."
    ),
    time_limit: str = typer.Option("24:00:00", help="Slurm's --time."),
    partition: str = typer.Option("", help="Slurm's --partition."),
    account: str = typer.Option("", help="Slurm's --account."),
    qos: str = typer.Option("", help="Slurm's --qos."),
    mem: str = typer.Option("", help="Slurm's --mem; 0 (all) where the nodes are exclusive and it is absent."),
    directives: list[str] = typer.Option(
        [], "--directive", help="Further #SBATCH line: --directive=--constraint=h100. May be repeated."
    ),
    setup: str = typer.Option(". .venv/bin/activate", help="Shell line that makes hsmn-dist and ray available."),
    container: str = typer.Option("", help="Apptainer image to run everything in (then give --setup '')."),
    binds: list[str] = typer.Option(
        [], "--bind", help="Folder that the container sees beside the run root and the configuration. May be repeated."
    ),
    mlflow_uri: str = typer.Option("", help="MLflow server that the nodes reach."),
    signal_seconds: int = typer.Option(300, min=60, help="Checkpoint and requeue this long before the time limit."),
    array: str = typer.Option(
        "",
        help="Slurm's --array. A run: task i has seed + i and a name of its own. A study: task i is run i; all when absent.",
    ),
    name: str = typer.Option("", help="Name of the run; the configuration's with the kind when absent."),
    run_root: str = typer.Option("", help="Folder of runs that every node sees; the configuration's when absent."),
) -> None:
    """Print the sbatch script: one Ray cluster per allocation, TERM and USR1 handled, requeue resumes the run."""
    from hsmn_dist.config.yaml_source import read_yaml
    from hsmn_dist.orchestration.slurm_settings import SlurmSettings

    settings = SlurmSettings(
        kind=kind or "many_nodes",
        time_limit=time_limit,
        partition=partition,
        account=account,
        qos=qos,
        mem=mem,
        directives=tuple(directives),
        setup=setup,
        container=container,
        binds=tuple(binds),
        mlflow_uri=mlflow_uri,
        signal_seconds=signal_seconds,
        array=array,
        name=name,
        run_root=run_root,
    )
    tree = read_yaml(config)
    is_study = "variants" in tree.data
    typer.echo((_study if is_study else _run)(config, tree, settings, has_kind=bool(kind)), nl=False)


def _run(path: Path, tree: SourceTree, settings: SlurmSettings, has_kind: bool) -> str:
    """The script of a run; the server's address is checked as the configuration's would be."""
    from hsmn_dist.config.load import load_run_config
    from hsmn_dist.orchestration.slurm_script import slurm_script

    changes = [f"tracking.uri={settings.mlflow_uri}"] if settings.mlflow_uri else []
    config = load_run_config(path, changes)
    if not has_kind:
        settings = replace(settings, kind="one_node" if config.cluster.num_nodes == 1 else "many_nodes")
    return slurm_script(config, str(path), settings, _include_folders(tree) if settings.container else [])


def _study(path: Path, tree: SourceTree, settings: SlurmSettings, has_kind: bool) -> str:
    """The script of a study, an array over its runs."""
    from hsmn_dist.config.study import load_study
    from hsmn_dist.config.yaml_source import read_yaml
    from hsmn_dist.orchestration.slurm_script import study_slurm_script
    from hsmn_dist.orchestration.study import study_runs

    study = load_study(path)
    configs = [run.config for run in study_runs(path, study, Path(settings.run_root or "runs"))]
    if not has_kind:
        settings = replace(settings, kind="one_node" if configs[0].cluster.num_nodes == 1 else "many_nodes")
    folders = [*_include_folders(tree), *_include_folders(read_yaml(path.parent / study.base))]
    return study_slurm_script(study, str(path), configs, settings, folders if settings.container else [])


def _include_folders(tree: SourceTree) -> list[str]:
    """Folders of the files that a configuration was read from; a container must see them."""
    return sorted({str(Path(position.rpartition(":")[0]).parent) for position in tree.positions.values()})
