"""What went wrong, and what to do about it: one readable table.

Ray Train replaces workers and nodes that died; it cannot know that a configuration error will not go away, or that the machine
asked the run to leave. Each rank writes a failure record before it dies, the launcher reads the records, and this table decides.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsmn_dist.foundation.errors import HsmnError, Preempted, StageFailed
from hsmn_dist.foundation.files import read_json, write_json


class FailureKind(enum.Enum):
    """Why a stage stopped."""

    BAD_INPUT = "bad_input"
    PREEMPTED = "preempted"
    WORKER_LOST = "worker_lost"
    OUT_OF_MEMORY = "out_of_memory"
    NON_FINITE = "non_finite"
    DISK_FULL = "disk_full"
    HUNG = "hung"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Policy:
    """`retries` is how often the stage is started again from its last checkpoint; `advice` is what the operator reads."""

    retries: int
    advice: str


POLICIES: dict[FailureKind, Policy] = {
    FailureKind.BAD_INPUT: Policy(0, "mend what the message names; nothing was lost"),
    FailureKind.PREEMPTED: Policy(0, "start the same command again; it resumes"),
    FailureKind.WORKER_LOST: Policy(3, "a process or machine died; the last checkpoint is used"),
    FailureKind.OUT_OF_MEMORY: Policy(
        0, "halve training.micro_batch_examples (the global batch stays), or raise zero_stage"
    ),
    FailureKind.NON_FINITE: Policy(0, "lower the learning rate, or set training.max_gradient_norm"),
    FailureKind.DISK_FULL: Policy(0, "free space under the run root; the last checkpoint is whole"),
    FailureKind.HUNG: Policy(1, "a rank fell silent; its host and last step are named"),
    FailureKind.UNKNOWN: Policy(0, "read the traceback in the failure record"),
}


# What gloo and NCCL say to a rank whose neighbour died.
LOST_NEIGHBOUR_SIGNS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "gloo/transport",
    "NCCL error",
    "Timed out waiting",
)


@dataclass(frozen=True)
class FailureRecord:
    """What one rank wrote before it stopped."""

    kind: FailureKind
    rank: int
    host: str
    message: str
    traceback: str
    attempt: str
    found: str = ""
    allowed: str = ""
    action: str = ""


def classify(error: BaseException) -> FailureKind:
    """Failure kind of an exception raised on a rank."""
    if isinstance(error, Preempted):
        return FailureKind.PREEMPTED
    if isinstance(error, StageFailed):
        known = {kind.value: kind for kind in FailureKind}
        return known.get(error.kind, FailureKind.UNKNOWN)
    if isinstance(error, HsmnError):
        return FailureKind.BAD_INPUT if error.exit_code == 2 else FailureKind.UNKNOWN
    if isinstance(error, OSError) and error.errno == 28:
        return FailureKind.DISK_FULL
    if type(error).__name__ in ("DistBackendError", "DistNetworkError") or any(
        sign in str(error) for sign in LOST_NEIGHBOUR_SIGNS
    ):
        return FailureKind.WORKER_LOST
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return FailureKind.OUT_OF_MEMORY
    return FailureKind.UNKNOWN


def write_failure(path: Path, record: FailureRecord) -> None:
    """Write a rank's record atomically."""
    write_json(path, {**record.__dict__, "kind": record.kind.value})


def read_failures(folder: Path, attempt: str) -> list[FailureRecord]:
    """Records of this attempt, lowest rank first. A rank that died of its neighbour's death comes after the culprit."""
    records = []
    for path in sorted(folder.glob("rank_*.json")):
        data: dict[str, Any] = read_json(path)
        record = FailureRecord(**{**data, "kind": FailureKind(data["kind"])})
        if record.attempt == attempt:
            records.append(record)
    blame = {FailureKind.UNKNOWN: 1, FailureKind.WORKER_LOST: 2}
    return sorted(records, key=lambda record: (blame.get(record.kind, 0), record.rank))


def must_stop(records: list[FailureRecord]) -> bool:
    """True when a record says that starting the ranks again would not help."""
    return any(POLICIES[record.kind].retries == 0 for record in records)
