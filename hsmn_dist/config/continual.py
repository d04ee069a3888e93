"""Fisher information and the methods that keep earlier tasks (continual.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from hsmn_dist.config.section import Section

Estimator = Literal["sampled", "empirical", "logit_reversal", "sampled_sum", "signed_sum", "microbatch"]


class FisherConfig(Section):
    """Diagonal Fisher after each stage (continual.md section 3)."""

    estimator: Estimator = Field(
        "logit_reversal",
        description="Which gradient is squared; stored beside the numbers. The default kept most in docs/study_forgetting.md.",
    )
    num_fisher_examples: int = Field(
        2048, ge=1, description="Training examples used (all of them when there are fewer)."
    )
    micro_batch_examples: int = Field(8, ge=1, description="Examples per backward pass and rank.")
    num_groups: int = Field(
        64, ge=1, description="Groups of the `_sum` estimators; relative error sqrt(2 / num_groups)."
    )
    example_reduction: Literal["mean", "sum"] = Field(
        "mean", description="An example's log-likelihood is the mean or the sum over its valid target tokens."
    )
    seed: int = Field(0, description="Seed of sampled labels and of the choice of examples.")
    checks_fast_path: bool = Field(
        True,
        description="Compute the first micro-batch also with one backward pass per example; a difference switches to it.",
    )
    save_every_seconds: float = Field(
        300.0,
        ge=0,
        description="Seconds between two saves of an unfinished Fisher, so that a killed one resumes; 0: never by time. A shorter pass saves nothing.",
    )
    save_every_batches: int = Field(
        0, ge=0, description="Save an unfinished Fisher also after every so many micro-batches; 0: by time alone."
    )


COMPONENTS = {
    "hsmn": ("embedding", "encoder", "compressor", "aggregator", "decompressor", "decoder", "head"),
    "hope": ("embedding", "mixer", "cms", "mlp", "head"),
    "hsmn_hope": ("embedding", "encoder", "compressor", "aggregator", "decompressor", "decoder", "cms", "head"),
}
"""Parts of each model family that may have a strength of their own; the models' `parameter_components` give the same names."""


class StartConfig(Section):
    """Weights from elsewhere that the first stage goes on from, and what they know."""

    weights: str = Field(
        "", description="Folder of exported weights (a stage's `weights`); empty: drawn from the run's seed."
    )
    fisher: str = Field(
        "",
        description="Store of those weights, as `hsmn-dist fisher WEIGHTS --out STORE` writes it: kept like an earlier stage. Needs ewc.",
    )

    @field_validator("weights", "fisher")
    @classmethod
    def _absolute(cls, path: str) -> str:
        """Ranks may run in another folder, and on other nodes: the place is fixed where the command is given."""
        return str(Path(path).expanduser().absolute()) if path else path


class ContinualConfig(Section):
    """What protects earlier stages while a later one trains."""

    method: Literal["none", "l2", "replay", "ewc", "ewc+replay", "joint"] = Field(
        "ewc", description="joint mixes all tasks: the upper bound."
    )
    strength: float = Field(
        100.0,
        ge=0,
        description="EWC or L2 lambda. For `empirical` and `sampled` about 5 times, for `proximal` about 400 times as much does the same.",
    )
    application: Literal["coupled", "proximal"] = Field(
        "coupled",
        description="coupled: the gradient joins the loss's before clipping; proximal: after the optimizer step, stable for every strength.",
    )
    online_decay: float = Field(
        1.0, gt=0, le=1, description="1: exact separate penalties merged; below 1: online EWC (arXiv 1805.06370)."
    )
    component_strength: dict[str, float] = Field(
        default_factory=dict,
        description="Factor on `strength` per model component (encoder, aggregator, decoder, ...); 1 where absent.",
    )
    replay_fraction: float = Field(
        0.2, gt=0, lt=1, description="Share of each batch drawn from earlier stages under replay."
    )
    fisher: FisherConfig = Field(FisherConfig(), description="Fisher estimation.")
    start: StartConfig = Field(StartConfig(), description="A pretrained model to continue from.")
