"""hsmn-dist fisher: the Fisher of weights that were trained anywhere, as an EWC store to continue from."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import typer

EXAMPLE = (
    "Example: hsmn-dist fisher runs/RUN/stages/00_NAME/weights --data runs/prepared/DIGEST/passkey --out fisher_passkey"
)


def command(
    checkpoint: str = typer.Argument(help="Run id, its beginning or end, a path, `latest`, or a folder of weights."),
    data: Path = typer.Option(..., help="Prepared folder (shards and index) made with the model's tokenizer."),
    out: Path = typer.Option(..., help="New folder for the store."),
    estimator: str = typer.Option(
        "logit_reversal", help="sampled, empirical, logit_reversal, sampled_sum, signed_sum, microbatch."
    ),
    num_examples: int = typer.Option(2048, min=1, help="Examples of the split."),
    split: str = typer.Option("train", help="Split of the prepared folder."),
    micro_batch: int = typer.Option(8, min=1, help="Examples per backward pass."),
    num_groups: int = typer.Option(64, min=1, help="Groups of sampled_sum and signed_sum."),
    reduction: str = typer.Option("mean", help="An example's loss is the mean or the sum over its target tokens."),
    seed: int = typer.Option(0, help="Seed of sampled labels and of the choice of examples."),
    name: str = typer.Option("pretrained", help="Name of the task in the store."),
    stage: int | None = typer.Option(None, help="Stage whose weights are used; the newest complete one when absent."),
    run_root: Path = typer.Option(Path("runs"), help="Folder of runs."),
) -> None:
    """Measure which weights matter for a dataset; prints what was measured as JSON."""
    from hsmn_dist.config.continual import FisherConfig
    from hsmn_dist.foundation.errors import ConfigError
    from hsmn_dist.orchestration.trained_model import load_trained
    from hsmn_dist.training.checkpoint_fisher import save_fisher_of_weights

    known = ("sampled", "empirical", "logit_reversal", "sampled_sum", "signed_sum", "microbatch")
    if estimator not in known:
        raise ConfigError(f"--estimator {estimator!r}", allowed=", ".join(known), action="choose one of them")
    if reduction not in ("mean", "sum"):
        raise ConfigError(f"--reduction {reduction!r}", allowed="mean, sum", action="choose one of them")
    config = FisherConfig.model_validate(
        {
            "estimator": estimator,
            "num_fisher_examples": num_examples,
            "micro_batch_examples": micro_batch,
            "num_groups": num_groups,
            "example_reduction": reduction,
            "seed": seed,
        }
    )
    trained = load_trained(checkpoint, run_root, stage)
    measure = functools.partial(
        save_fisher_of_weights,
        trained.model,
        data,
        config,
        out,
        name=name,
        split=split,
        tokenizer_digest=trained.tokenizer.digest,
    )
    if not sys.stderr.isatty():
        facts = measure()
    else:
        from rich.progress import Progress

        with Progress() as bars:
            task = bars.add_task("Fisher", total=None)
            facts = measure(progress=lambda done, total: bars.update(task, completed=done, total=total))
    typer.echo(json.dumps(dict(facts), indent=2, default=str))
