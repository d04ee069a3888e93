"""RunConfig: one file, one run; one field per room of the house."""

from __future__ import annotations

from pydantic import Field

from hsmn_dist.config.cluster import ClusterConfig
from hsmn_dist.config.continual import ContinualConfig
from hsmn_dist.config.curriculum import CurriculumConfig
from hsmn_dist.config.data import DataConfig, TokenizerConfig
from hsmn_dist.config.evaluation import EvaluationConfig
from hsmn_dist.config.models import ModelConfig
from hsmn_dist.config.optim import OptimConfig
from hsmn_dist.config.section import Section
from hsmn_dist.config.tracking import TrackingConfig
from hsmn_dist.config.training import TrainingConfig


class RunConfig(Section):
    """Everything that decides a run. The resolved copy is stored with the run as `config.yaml`."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="Short name; part of the run id.")
    seed: int = Field(42, ge=0, description="Seed of weights, order and dropout.")
    run_root: str = Field("runs", description="Folder of all runs, relative to the working directory.")
    model: ModelConfig = Field(description="Architecture.")
    tokenizer: TokenizerConfig = Field(TokenizerConfig(), description="Tokenizer.")
    data: DataConfig = Field(DataConfig(), description="Preparation and stream.")
    optim: OptimConfig = Field(OptimConfig(), description="Optimizer and schedule.")
    training: TrainingConfig = Field(TrainingConfig(), description="Training loop.")
    continual: ContinualConfig = Field(ContinualConfig(), description="Protection of earlier stages.")
    curriculum: CurriculumConfig = Field(description="Stages.")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="Scoring.")
    tracking: TrackingConfig = Field(TrackingConfig(), description="Metrics.")
    cluster: ClusterConfig = Field(ClusterConfig(), description="Machines.")
