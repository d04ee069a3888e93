"""hsmn-dist stage: run stages of a run as one rank. torchrun starts it; a bare shell can too (one rank).

torchrun takes `--run` for an abbreviation of its own `--run-path`, wherever it stands: behind torchrun the option is `--run-folder`.
"""

from __future__ import annotations

import signal
from pathlib import Path

import typer

from hsmn_dist.foundation.errors import ConfigError

EXAMPLE = "Example: torchrun --nproc-per-node 2 -m hsmn_dist stage --run-folder runs/RUN_ID --index 0"


def command(
    run: Path = typer.Option(..., "--run-folder", "--run", help="Run folder, made by `hsmn-dist run`."),
    index: int = typer.Option(0, min=0, help="First stage to run, from 0."),
    through: int = typer.Option(-1, help="Last stage to run; the first one alone when absent."),
    attempt: str = typer.Option("", help="Attempt token; the run's present one when absent."),
    ends_with_parent: bool = typer.Option(
        False, "--ends-with-parent", help="Leave when the process that started it dies."
    ),
) -> None:
    """Run stages of a run as one rank of the group that RANK and WORLD_SIZE describe."""
    from hsmn_dist.foundation.files import read_json
    from hsmn_dist.orchestration.curriculum import load_stored_config
    from hsmn_dist.orchestration.run_folder import RunFolder
    from hsmn_dist.orchestration.stage import stage_specs
    from hsmn_dist.orchestration.stage_runner import run_stages

    if ends_with_parent:
        from hsmn_dist.orchestration.end_with_parent import end_with_parent

        end_with_parent(signal.SIGKILL)
    folder = RunFolder(run.resolve())
    if not folder.config.is_file():
        raise ConfigError(f"{run}: no config.yaml", allowed="a run folder", action="see `hsmn-dist runs list`")
    token = attempt or read_json(folder.attempt)["token"]
    specs = stage_specs(load_stored_config(folder), folder, token)
    if index >= len(specs):
        raise ConfigError(f"--index {index}", allowed=f"0 to {len(specs) - 1}", action="count stages from 0")
    run_stages(specs[index : max(through, index) + 1])
