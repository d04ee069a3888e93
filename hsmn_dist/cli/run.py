"""hsmn-dist run: one configuration file, one run, from rows to scorecard; or take up a run that stopped."""

from __future__ import annotations

from pathlib import Path

import typer

from hsmn_dist.foundation.errors import ConfigError

EXAMPLE = (
    "Examples: hsmn-dist run configs/runs/hsmn_debug_demo_cpu.yaml --set training.max_steps=50;  "
    "hsmn-dist run --resume latest"
)


def command(
    config: Path | None = typer.Argument(None, help="Run configuration (YAML)."),
    resume: str = typer.Option("", help="Take up this run: its id, beginning or end, a path, or `latest`."),
    launcher: str = typer.Option(
        "", help="ray, local (torchrun) or inline (one rank, no new process); the configuration's when absent."
    ),
    assignments: list[str] = typer.Option([], "--set", help="Change one setting: section.key=value. May be repeated."),
    run_root: Path = typer.Option(Path("runs"), help="Where --resume looks for runs."),
    quiet: bool = typer.Option(False, "--quiet", help="No progress."),
    verbose: bool = typer.Option(False, "--verbose", help="Debug messages."),
) -> None:
    """Prepare data, train every stage, score, write the scorecard."""
    from hsmn_dist.config.load import load_run_config
    from hsmn_dist.foundation.log import configure_logging
    from hsmn_dist.orchestration.curriculum import create_run, reopen_run
    from hsmn_dist.orchestration.run_folder import find_run

    if (config is None) == (not resume):
        raise ConfigError(
            "neither a configuration nor --resume" if config is None else "a configuration and --resume",
            allowed="hsmn-dist run CONFIG, or hsmn-dist run --resume RUN",
            action="choose one of the two",
        )
    if resume and assignments:
        raise ConfigError(
            "--set with --resume", allowed="a run that goes on as it began", action="start a new run to change settings"
        )
    configure_logging(verbose=verbose)
    if resume:
        run = reopen_run(find_run(resume, run_root))
    else:
        assert config is not None
        overrides = [*assignments, *([f"cluster.launcher={launcher}"] if launcher else [])]
        run = create_run(load_run_config(config, overrides))
    if run.config.evaluation.runs_model_code:
        from hsmn_dist.evaluation.sandbox import Sandbox

        Sandbox()  # refuses here, not after hours of training, where programs cannot be confined
    from hsmn_dist.cli.drive import drive

    drive(run, launcher or run.config.cluster.launcher, quiet=quiet)
