"""Optimizers and the learning-rate schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hsmn_dist.config.section import Section


class ScheduleConfig(Section):
    """Learning rate as a function of the optimizer step inside a stage."""

    kind: Literal["constant", "linear", "cosine"] = Field("cosine", description="Shape after warm-up.")
    warmup_steps: int = Field(10, ge=0, description="Steps of linear warm-up from 0.")
    final_fraction: float = Field(
        0.1, ge=0.0, le=1.0, description="Rate at the stage's last step as a share of the peak rate."
    )


class AdamConfig(Section):
    """Adam, or AdamW when weight_decay is above 0 (Loshchilov and Hutter 2019, arXiv 1711.05101)."""

    kind: Literal["adam"] = "adam"
    learning_rate: float = Field(5e-5, gt=0, description="Peak rate; 5e-5 is the original's.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    beta2: float = Field(0.999, ge=0, lt=1, description="Decay of the second moment.")
    eps: float = Field(1e-8, gt=0, description="Added to the root of the second moment.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")


OptimizerConfig = Annotated[AdamConfig, Field()]


class OptimConfig(Section):
    """The optimizer of every stage."""

    optimizer: OptimizerConfig = Field(AdamConfig(), description="Update rule.")
    schedule: ScheduleConfig = Field(ScheduleConfig(), description="Learning-rate schedule.")
