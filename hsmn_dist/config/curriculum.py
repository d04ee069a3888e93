"""The ordered stages of a run, and what each may change."""

from __future__ import annotations

from pydantic import Field

from hsmn_dist.config.data import DatasetConfig
from hsmn_dist.config.section import Section


class StageConfig(Section):
    """One task of the curriculum."""

    name: str = Field(pattern=r"^[a-z0-9_]+$", description="Name of the stage folder and of the task in every table.")
    datasets: tuple[DatasetConfig, ...] = Field(min_length=1, description="Mixture that the stage trains on.")
    max_steps: int | None = Field(None, ge=1, description="Overrides training.max_steps.")
    learning_rate: float | None = Field(None, gt=0, description="Overrides the optimizer's peak rate.")
    strength: float | None = Field(None, ge=0, description="Overrides continual.strength while this stage trains.")


class CurriculumConfig(Section):
    """Stages in training order."""

    stages: tuple[StageConfig, ...] = Field(min_length=1, description="Stages in order; names must differ.")
