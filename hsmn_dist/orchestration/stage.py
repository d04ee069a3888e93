"""What crosses the process line between driver and ranks: plain values that a human can read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hsmn_dist.config.curriculum import StageConfig
from hsmn_dist.config.run import RunConfig
from hsmn_dist.orchestration.run_folder import RunFolder


@dataclass(frozen=True)
class StageSpec:
    """One stage to be trained. Everything else is read from the run folder."""

    run_folder: str
    index: int
    name: str
    attempt: str

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> StageSpec:
        """Inverse of `to_json`."""
        data: dict[str, Any] = json.loads(text)
        return cls(**{field.name: data[field.name] for field in fields(cls)})

    @property
    def folder(self) -> RunFolder:
        """The run it belongs to."""
        return RunFolder(Path(self.run_folder))


def training_stages(config: RunConfig) -> tuple[StageConfig, ...]:
    """The stages that are trained: the curriculum's, or one stage that mixes all of them under method `joint`."""
    stages = config.curriculum.stages
    if config.continual.method != "joint":
        return stages
    datasets = tuple({dataset.key: dataset for stage in stages for dataset in stage.datasets}.values())
    steps = sum(stage.max_steps or config.training.max_steps for stage in stages)
    return (StageConfig(name="joint", datasets=datasets, max_steps=steps),)


def stage_specs(config: RunConfig, folder: RunFolder, attempt: str) -> list[StageSpec]:
    """Every stage of a run, in order."""
    return [
        StageSpec(str(folder.path), index, stage.name, attempt) for index, stage in enumerate(training_stages(config))
    ]


def pending_specs(config: RunConfig, folder: RunFolder, attempt: str) -> list[StageSpec]:
    """The stages that have no COMPLETE manifest, from the first such one on (later stages build on earlier ones)."""
    specs = stage_specs(config, folder, attempt)
    done = [folder.stage(spec.index, spec.name).is_complete for spec in specs]
    first = done.index(False) if False in done else len(specs)
    return specs[first:]
