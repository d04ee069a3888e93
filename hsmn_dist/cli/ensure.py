"""hsmn-dist ensure: the run of a name, once: start it, resume it, follow it, or find it complete. What queues start."""

from __future__ import annotations

from pathlib import Path

import typer

EXAMPLE = "Example: hsmn-dist ensure configs/runs/hsmn_debug_demo_cpu.yaml --name demo"


def command(
    config: Path = typer.Argument(help="Run configuration (YAML)."),
    name: str = typer.Option("", help="Name of the run under the run root; the configuration's when absent."),
    launcher: str = typer.Option("", help="ray or local (torchrun); the configuration's when absent."),
    assignments: list[str] = typer.Option([], "--set", help="Change one setting: section.key=value. May be repeated."),
    stale_seconds: float = typer.Option(
        30.0, min=1.0, help="Silence after which another driver's lease is taken over."
    ),
    quiet: bool = typer.Option(False, "--quiet", help="No progress."),
) -> None:
    """Bring the run of that name to its end; safe to give twice, on two machines, or after a preemption (exit 75)."""
    from hsmn_dist.cli.drive import drive
    from hsmn_dist.config.load import load_run_config
    from hsmn_dist.foundation.log import configure_logging
    from hsmn_dist.orchestration.curriculum import Run
    from hsmn_dist.orchestration.named_run import NamedRun, ensure_run

    configure_logging(verbose=False)
    settings = load_run_config(config, [*assignments, *([f"cluster.launcher={launcher}"] if launcher else [])])
    named = NamedRun(Path(settings.run_root).resolve(), name or settings.name)

    def run_it(run: Run) -> None:
        drive(run, run.config.cluster.launcher, quiet=quiet)

    folder = ensure_run(named, settings, run_it, lambda text: typer.echo(text, err=True), stale_seconds)
    typer.echo(f"scorecard: {folder.scorecard}")
