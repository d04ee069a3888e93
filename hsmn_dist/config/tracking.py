"""Where metrics go. `metrics.jsonl` in the run folder is always written."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hsmn_dist.config.section import Section


class TrackingConfig(Section):
    """Trackers of a run."""

    backend: Literal["mlflow", "none"] = Field("mlflow", description="none: metrics.jsonl alone.")
    uri: str = Field("", description="MLflow server or database; empty: sqlite in the run root (runs/mlflow.db).")
    experiment: str = Field("hsmn_dist", description="MLflow experiment.")
    tags: dict[str, str] = Field(default_factory=dict, description="Extra MLflow tags.")
    flush_seconds: float = Field(2.0, gt=0, description="How often the uploader reads new lines of metrics.jsonl.")
    finish_timeout_seconds: float = Field(
        30.0, ge=0, description="Longest wait for the last upload; what is left then goes with `track sync`."
    )
    system_metrics_seconds: float = Field(
        10.0, ge=0, description="Time between samples of processor, memory, disk, network and GPU; 0 is off."
    )
    registered_model: str = Field(
        "hsmn_dist_text",
        description="Name under which the final model is registered in MLflow; empty: it is not logged.",
    )
