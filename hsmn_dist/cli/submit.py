"""hsmn-dist submit: a run as a job of an existing Ray cluster; follows it and returns its exit code."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

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
    run_root: str = typer.Option(
        "", help="Run folder on storage that every node sees; the configuration's when absent."
    ),
    detach: bool = typer.Option(False, "--detach", help="Return once it is submitted."),
    stop: bool = typer.Option(False, "--stop", help="Ask the job of that name to checkpoint and leave."),
) -> None:
    """Submit a run to a Ray cluster, follow its log, return its exit code. Ctrl-C stops following; --stop ends the job."""
    from hsmn_dist.config.load import load_run_config
    from hsmn_dist.orchestration import ray_jobs

    changes = [*assignments, *([f"run_root={run_root}"] if run_root else [])]
    settings = load_run_config(config, [*changes, "cluster.ray_address=auto"])
    words = [*shlex.split(program), "ensure", str(config), "--name", name or settings.name]
    for change in [*changes, "cluster.ray_address=auto", "cluster.launcher=ray"]:
        words += ["--set", change]
    request = ray_jobs.JobRequest(
        name=name or settings.name,
        entrypoint=shlex.join(words),
        working_dir=working_dir,
        pip_packages=tuple(pip),
        grace_seconds=settings.cluster.grace_seconds,
    )
    client = ray_jobs.connect(address, token_file)
    if stop:
        ended = ray_jobs.stop(client, request.submission_id, settings.cluster.grace_seconds + 60)
        typer.echo(
            "stopped; submit it again to resume" if ended else "it was asked to stop and has not ended yet", err=True
        )
        raise typer.Exit(0 if ended else 1)
    identity = ray_jobs.submit(client, request, lambda text: typer.echo(text, err=True))
    if detach:
        typer.echo(identity)
        return
    try:
        code = ray_jobs.follow(client, identity, _write)
    except KeyboardInterrupt:
        typer.echo(f"\nno longer following; {identity} goes on (end it with --stop)", err=True)
        raise typer.Exit(130) from None
    raise typer.Exit(code)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
