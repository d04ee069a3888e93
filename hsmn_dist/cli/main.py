"""The `hsmn-dist` command: imports only the chosen sub-command, and turns errors into messages and exit codes.

Exit codes: 0 done, 1 failed, 2 bad input, 75 preempted (a checkpoint was written; start the same command again).
"""

from __future__ import annotations

import importlib
import sys
import traceback

import typer

from hsmn_dist import __version__
from hsmn_dist.foundation.errors import ConfigError, HsmnError
from hsmn_dist.foundation.redact import redact
from hsmn_dist.foundation.registry import near_name

# name -> (module, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("run", "Run a curriculum: prepare data, train every stage, score, write the scorecard."),
    "prepare": ("prepare", "Turn raw rows into tokenized tar shards."),
    "stage": ("stage", "Run stages as one rank; what torchrun starts."),
    "evaluate": ("evaluate", "Score the weights of a stage, or any exported weights."),
    "generate": ("generate", "Write text with a trained model."),
    "scorecard": ("scorecard", "Rebuild, print and compare scorecards."),
    "compare": ("compare", "Runs side by side: a table, heat maps, forgetting curves."),
    "fisher": ("fisher", "The Fisher of weights trained anywhere, to continue from."),
    "runs": ("runs", "List runs, show one, say why one failed."),
    "ensure": ("ensure", "Bring the run of a name to its end: start, resume or follow it; safe to repeat."),
    "submit": ("submit", "Submit a run to a Ray cluster, follow it, return its exit code."),
    "slurm": ("slurm", "Print the Slurm batch script of a run."),
    "study": ("study", "Every method with every seed on one curriculum, and one report."),
    "data": ("data", "List the known datasets, show one, check prepared shards."),
    "plan": ("plan", "Memory, hours and cost of a run on given machines."),
    "verify": ("verify", "Check a model's invariants on any weights, on a CPU."),
    "probe": ("probe", "Recall of hidden facts by depth and length, with its heat map."),
    "track": ("track", "Upload a run's metrics to MLflow later."),
    "doctor": ("doctor", "Check this machine: versions, devices, disk, Ray, MLflow."),
}


USAGE = "Usage: hsmn-dist COMMAND [OPTIONS] ...   (hsmn-dist COMMAND --help for each)"


def help_text() -> str:
    """The page of `hsmn-dist --help`, written without importing any command."""
    width = max(map(len, COMMANDS)) + 2
    rows = [f"  {name:<{width}}{summary}" for name, (_, summary) in COMMANDS.items()]
    example = "Example: hsmn-dist run configs/runs/hsmn_debug_demo_cpu.yaml"
    codes = "Exit codes: 0 done, 1 failed, 2 bad input, 75 preempted (start the same command again)."
    purpose = "Train HSMN and HOPE language models through a curriculum, and keep what they learned."
    return "\n".join([USAGE, "", purpose, "", "Commands:", *rows, "", example, codes])


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Ends the process with the exit code."""
    sys.exit(run_command(sys.argv[1:] if arguments is None else arguments))


def run_command(arguments: list[str]) -> int:
    """Run one command line and return its exit code; errors are printed to standard error."""
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        typer.echo(help_text())
        return 0
    if arguments[0] in ("--version", "-V"):
        typer.echo(f"hsmn-dist {__version__}")
        return 0
    name = arguments[0]
    try:
        if name not in COMMANDS:
            near = near_name(name, COMMANDS)
            raise ConfigError(
                f"no command {name!r}",
                allowed=", ".join(COMMANDS),
                action=f"did you mean {near!r}?" if near else "see hsmn-dist --help",
            )
        build_application(name)(args=arguments[1:], prog_name=f"hsmn-dist {name}")
    except HsmnError as error:
        print_error(error)
        return error.exit_code
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        return 130
    except Exception:
        typer.echo(redact(traceback.format_exc()), err=True)
        typer.echo("\nerror: this is a defect of hsmn-dist, not of your input; please report the lines above", err=True)
        return 1
    return 0


def build_application(name: str) -> typer.Typer:
    """Import one sub-command. Its module has `command`, a function with typer annotations, or `app`."""
    module = importlib.import_module(f"hsmn_dist.cli.{COMMANDS[name][0]}")
    application: typer.Typer
    if hasattr(module, "app"):
        application = module.app
    else:
        application = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        application.command(name, epilog=getattr(module, "EXAMPLE", None))(module.command)
    return application


def print_error(error: HsmnError) -> None:
    """The three parts of a message on standard error."""
    typer.echo(f"error: {error.found}", err=True)
    typer.echo(f"  allowed: {error.allowed}", err=True)
    typer.echo(f"  do: {error.action}", err=True)
