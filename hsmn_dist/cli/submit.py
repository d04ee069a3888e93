"""hsmn-dist submit: a run as a job of an existing Ray cluster; follows it and returns its exit code."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import typer

EXAMPLE = "Example: hsmn-dist submit configs/runs/hsmn_debug_demo_cpu.yaml --address http://head:8265 --token-file ~/.ray/auth_token"


def command(
    config: Path = typer.Argument(
        help="Run configuration (YAML), as the cluster's nodes see it (or in --working-dir)."
    ),
    address: str = typer.Option("http://127.0.0.1:8265", help="Job server of the Ray cluster."),
    name: str = typer.Option(
        "", help="Name of the run; the configuration's when absent. Submitting a name twice follows it."
    ),
    token_file: Path | None = typer.Option(None, help="File with the cluster's token."),
    working_dir: str = typer.Option(
        "", help="Upload this folder; for nodes whose image lacks the program or the configuration."
    ),
    pip: list[str] = typer.Option([], "--pip", help="Package that bare nodes install first. May be repeated."),
    program: str = typer.Option(
        "hsmn-dist", help="How the nodes call this program (`python -m hsmn_dist` from --working-dir)."
    ),
    assignments: list[str] = typer.Option([], "--set", help="Change one setting: section.key=value. May be repeated."),
    driver_cpus: float = typer.Option(
        1.0, min=0.0, help="Cores that the driver reserves beside its ranks; 0 puts it on the head node."
    ),
    run_root: str = typer.Option(
        "", help="Run folder on storage that every node sees; the configuration's when absent."
    ),
    detach: bool = typer.Option(False, "--detach", help="Return once it is submitted."),
    stop: bool = typer.Option(False, "--stop", help="Ask the job of that name to checkpoint and leave."),
) -> None:
    """Submit a run to a Ray cluster, follow its log, return its exit code. Ctrl-C stops following; --stop ends the job."""
    from hsmn_dist.config.load import config_digest, load_run_config
    from hsmn_dist.orchestration import ray_jobs

    on_cluster = ["cluster.ray_address=auto", "cluster.launcher=ray"]
    changes = [*assignments, *([f"run_root={run_root}"] if run_root else []), *on_cluster]
    settings = load_run_config(config, changes)
    words = [*shlex.split(program), "ensure", str(config), "--name", name or settings.name]
    for change in changes:
        words += ["--set", change]
    request = ray_jobs.JobRequest(
        name=name or settings.name,
        entrypoint=shlex.join(words),
        working_dir=working_dir,
        pip_packages=tuple(pip),
        num_cpus=driver_cpus,
        ranks_num_cpus=settings.cluster.world_sizes[0] * settings.cluster.cpus_per_rank,
        grace_seconds=settings.cluster.grace_seconds,
        settings_digest=config_digest(settings),
    )
    client = ray_jobs.connect(address, token_file)
    if stop:
        raise typer.Exit(_stop(client, request))
    identity = ray_jobs.submit(client, request, _say)
    if detach:
        typer.echo(identity)
        return
    try:
        code = ray_jobs.follow(client, identity, _write, _say)
    except KeyboardInterrupt:
        typer.echo(f"\nno longer following; {identity} goes on (end it with --stop)", err=True)
        raise typer.Exit(130) from None
    raise typer.Exit(code)


def _stop(client: Any, request: Any) -> int:
    from hsmn_dist.orchestration import ray_jobs

    status = ray_jobs.stop(client, request, request.grace_seconds + 60, _say)
    if status is None:
        _say("it was asked to stop and has not ended yet")
        return 1
    _say(f"it ended as {status.value}" + ("" if status.value == "SUCCEEDED" else "; submit it again to resume"))
    return 0


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
