"""The only place that knows the run folder's paths.

runs/<run_id>/ config.yaml provenance.json prepared.json journal.jsonl attempt.json adjustments.json baseline.json scorecard.*
  stages/00_<name>/ checkpoints/ ewc/ weights/ metrics.jsonl results.json failures/ COMPLETE
runs/prepared/<digest>/   tokenizer and shards, shared by the runs that need the same
runs/mlflow.db            the default tracker
"""

from __future__ import annotations

import secrets
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from hsmn_dist.foundation.errors import ConfigError
from hsmn_dist.foundation.registry import near_name

FISHER_UNFINISHED = "fisher_unfinished"


@dataclass(frozen=True)
class StageFolder:
    """Paths of one stage. It is finished when `complete` exists."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of the stage, one folder per step."""
        return self.path / "checkpoints"

    @property
    def ewc(self) -> Path:
        """Merged Fisher and anchor after this stage."""
        return self.path / "ewc"

    @property
    def fisher_unfinished(self) -> Path:
        """The Fisher pass on its way, resumable."""
        return self.path / FISHER_UNFINISHED

    @property
    def weights(self) -> Path:
        """Exported weights (safetensors) with their configuration."""
        return self.path / "weights"

    @property
    def metrics(self) -> Path:
        """Every metric point of the stage, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def examples(self) -> Path:
        """Example indexes of every step, one JSON object a line, where `training.records_examples` is set."""
        return self.path / "examples.jsonl"

    @property
    def results(self) -> Path:
        """Training summary and the scores of every task after this stage."""
        return self.path / "results.json"

    @property
    def complete(self) -> Path:
        """Manifest, written last."""
        return self.path / "COMPLETE"

    @property
    def is_complete(self) -> bool:
        """True once the manifest is there."""
        return self.complete.is_file()


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def run_id(self) -> str:
        """Date, short name, six hexadecimal digits."""
        return self.path.name

    @property
    def root(self) -> Path:
        """Folder of all runs."""
        return self.path.parent

    @property
    def config(self) -> Path:
        """Resolved configuration."""
        return self.path / "config.yaml"

    @property
    def provenance(self) -> Path:
        """Commit, versions, host."""
        return self.path / "provenance.json"

    @property
    def prepared(self) -> Path:
        """Where the tokenizer and the shards of each dataset are."""
        return self.path / "prepared.json"

    @property
    def journal(self) -> Path:
        """Append-only history of the run."""
        return self.path / "journal.jsonl"

    @property
    def attempt(self) -> Path:
        """Token of the attempt that may commit."""
        return self.path / "attempt.json"

    @property
    def attempt_lock(self) -> Path:
        """Locked while `attempt.json` is changed."""
        return self.path / "attempt.lock"

    @property
    def adjustments(self) -> Path:
        """What retries changed of the configuration (smaller micro-batches); absent as long as nothing was."""
        return self.path / "adjustments.json"

    @property
    def baseline(self) -> Path:
        """Scores of every task before any training."""
        return self.path / "baseline.json"

    @property
    def stop_request(self) -> Path:
        """Exists while the run is asked to checkpoint and leave."""
        return self.path / "stop_request"

    @property
    def tracker_state(self) -> Path:
        """Tracker run ids, so that a resumed run continues them."""
        return self.path / "tracker.json"

    @property
    def scorecard(self) -> Path:
        """Scorecard JSON; .md, .html and .png lie beside it."""
        return self.path / "scorecard.json"

    def failure(self, rank: int) -> Path:
        """Failure record of a rank in the current attempt."""
        return self.path / "failures" / f"rank_{rank:05d}.json"

    def stage(self, index: int, name: str) -> StageFolder:
        """Folder of stage `index` (from 0)."""
        return StageFolder(self.path / "stages" / f"{index:02d}_{name}")


DEFAULT_ROOT = "runs"


def resume_command(folder: RunFolder) -> str:
    """The exact command line that takes a run up again."""
    words = ["hsmn-dist", "run", "--resume", folder.run_id]
    if folder.root != Path(DEFAULT_ROOT).resolve():
        words += ["--run-root", str(folder.root)]
    return shlex.join(words)


def new_run_folder(run_root: Path, name: str) -> RunFolder:
    """A fresh, not yet existing run folder."""
    run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-{secrets.token_hex(3)}"
    return RunFolder((run_root / run_id).resolve())


def list_runs(run_root: Path) -> list[RunFolder]:
    """Every run under a root, oldest first."""
    if not run_root.is_dir():
        return []
    return [RunFolder(path.resolve()) for path in sorted(run_root.iterdir()) if (path / "config.yaml").is_file()]


def find_run(reference: str, run_root: Path) -> RunFolder:
    """The run named by a path, a run id, the unique beginning or end of one, or `latest`.

    Raises:
        ConfigError: no run or several runs match.
    """
    path = Path(reference)
    if (path / "config.yaml").is_file():
        return RunFolder(path.resolve())
    runs = list_runs(run_root)
    if reference == "latest" and runs:
        return runs[-1]
    matches = [run for run in runs if run.run_id.startswith(reference) or run.run_id.endswith(reference)]
    if len(matches) == 1:
        return matches[0]
    names = [run.run_id for run in runs]
    near = near_name(reference, names)
    raise ConfigError(
        f"{reference!r} names {len(matches) or 'no'} runs in {run_root}",
        allowed=", ".join(names[-8:]) or f"a run; {run_root} has none",
        action=f"did you mean {near!r}?" if near else "see `hsmn-dist runs list`",
    )
