"""A study's runs: every variant with every seed, each found again when it is complete, resumed when it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hsmn_dist.config.load import config_digest
from hsmn_dist.config.run import RunConfig
from hsmn_dist.config.study import StudyConfig, study_run_config
from hsmn_dist.foundation.files import read_json
from hsmn_dist.orchestration.curriculum import Run, create_run, reopen_run
from hsmn_dist.orchestration.journal import read_events, run_status
from hsmn_dist.orchestration.run_folder import RunFolder, list_runs


@dataclass(frozen=True)
class StudyRun:
    """One cell of a study."""

    variant: str
    seed: int
    config: RunConfig

    def find(self) -> RunFolder | None:
        """The newest run of exactly this configuration, if there is one."""
        digest = config_digest(self.config)
        same = [
            folder
            for folder in list_runs(Path(self.config.run_root))
            if read_json(folder.provenance)["config_digest"] == digest
        ]
        return same[-1] if same else None

    @property
    def is_complete(self) -> bool:
        """True when its scorecard exists."""
        folder = self.find()
        return folder is not None and run_status(read_events(folder.journal)) == "complete"

    def open(self) -> Run:
        """A new run, or the one that stopped early."""
        folder = self.find()
        return create_run(self.config) if folder is None else reopen_run(folder)


def study_runs(path: Path, study: StudyConfig, run_root: Path) -> list[StudyRun]:
    """Every run of a study, variants in the file's order, seeds inside."""
    return [
        StudyRun(variant, seed, study_run_config(path, study, variant, seed, run_root / study.name))
        for variant in study.variants
        for seed in study.seeds
    ]


def run_pending(runs: list[StudyRun], drive: Callable[[Run], object]) -> Iterator[StudyRun]:
    """Drive what is not complete, one after the other; yields each run when it is done."""
    for run in runs:
        if not run.is_complete:
            drive(run.open())
        yield run
