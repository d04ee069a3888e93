"""What went wrong, and what to do about it: one readable table with budgets.

Launchers replace workers and nodes that died; they cannot know that a configuration error will not go away, that memory would
suffice for smaller micro-batches, or that the machine asked the run to leave. Each rank writes a failure record before it dies, the
launcher reads the records, and this table decides. Unusual: a launcher's restarts (`cluster.max_failures`), the driver's retries
(`Policy.retries`, for each kind by itself) and preemptions (without limit, and counted nowhere) are three budgets.
"""

from __future__ import annotations

import enum
import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsmn_dist.foundation.errors import HsmnError, Preempted, StageFailed
from hsmn_dist.foundation.files import read_json, write_json
from hsmn_dist.foundation.redact import redact_value


class FailureKind(enum.Enum):
    """Why a stage stopped."""

    BAD_INPUT = "bad_input"
    PREEMPTED = "preempted"
    WORKER_LOST = "worker_lost"
    OUT_OF_MEMORY = "out_of_memory"
    NON_FINITE = "non_finite"
    LOSS_SPIKE = "loss_spike"
    DISK_FULL = "disk_full"
    STORE_AWAY = "store_away"
    HUNG = "hung"
    FENCED = "fenced"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Policy:
    """What follows a failure.

    Attributes:
        what: the failure in plain words.
        retries: how often the driver starts the stages again from their last checkpoint, in one `hsmn-dist run`.
        advice: what the operator reads when that did not help.
        is_replaced: the launcher starts the ranks again by itself, `cluster.max_failures` times.
        halves_micro_batch: each retry halves `training.micro_batch_examples`; the global batch stays.
    """

    what: str
    retries: int
    advice: str
    is_replaced: bool = False
    halves_micro_batch: bool = False


POLICIES: dict[FailureKind, Policy] = {
    FailureKind.BAD_INPUT: Policy("the input cannot be used", 0, "mend what the message names; nothing was lost"),
    FailureKind.PREEMPTED: Policy("the machine asked the run to leave", 0, "start the same command again; it resumes"),
    FailureKind.WORKER_LOST: Policy(
        "a process or machine died", 0, "a process or machine died; the last checkpoint is used", is_replaced=True
    ),
    FailureKind.OUT_OF_MEMORY: Policy(
        "the memory was used up",
        8,
        "training.micro_batch_examples cannot be halved further: raise zero_stage, recompute activations, or take a "
        "smaller model",
        halves_micro_batch=True,
    ),
    FailureKind.NON_FINITE: Policy(
        "a loss or gradient was not a finite number", 0, "lower the learning rate, or set training.max_gradient_norm"
    ),
    FailureKind.LOSS_SPIKE: Policy(
        "the loss jumped far above the recent ones",
        0,
        "resume, or look at the data of that step and lower the learning rate",
    ),
    FailureKind.DISK_FULL: Policy(
        "the disk was full", 0, "free space under the run root; the last checkpoint is whole"
    ),
    FailureKind.STORE_AWAY: Policy(
        "the store of the data did not answer",
        3,
        "check the network and the store; data.fetch_attempts bounds how long it is asked",
    ),
    FailureKind.HUNG: Policy(
        "a rank fell silent", 1, "look at the host that is named: its load, its memory, its network"
    ),
    FailureKind.FENCED: Policy("this process was cut off and replaced", 0, "nothing to do: the newer attempt goes on"),
    FailureKind.UNKNOWN: Policy("an error that has no row in the table", 0, "read the traceback in the failure record"),
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
MEMORY_SIGNS = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "running low on memory",
)
"""The last one is Ray's memory monitor, which kills a worker before the kernel does."""
DISK_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space, quota used up, file-size limit: for the reader all of them are a full disk."""


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
    if isinstance(error, OSError) and error.errno in DISK_NUMBERS:
        return FailureKind.DISK_FULL
    if type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError") or any(
        sign in str(error) for sign in LOST_NEIGHBOUR_SIGNS
    ):
        return FailureKind.WORKER_LOST
    if is_out_of_memory(error):
        return FailureKind.OUT_OF_MEMORY
    return FailureKind.UNKNOWN


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is the host's or the device's allocator giving up. gloo's own texts are no such thing."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in text for sign in MEMORY_SIGNS)


RESERVED_BYTES = 32 * 1024


def reserve_failure(path: Path) -> None:
    """Take the space of a rank's record in advance, so that a full disk can be told."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _reserve_of(path).open("wb") as stream:
        stream.write(b" " * RESERVED_BYTES)
        stream.flush()
        os.fsync(stream.fileno())


def write_failure(path: Path, record: FailureRecord) -> None:
    """Write a rank's record atomically; into the reserved space where the disk takes no new file."""
    value = redact_value({**record.__dict__, "kind": record.kind.value})
    try:
        write_json(path, value)
    except OSError:
        short = {**value, "message": value["message"][:2000], "found": value["found"][:2000], "traceback": ""}
        reserve = _reserve_of(path)
        with reserve.open("r+b") as stream:  # the spaces behind the text are JSON too
            stream.write(json.dumps(short).encode())
        reserve.replace(path)


def _reserve_of(path: Path) -> Path:
    return path.with_name(f".reserved_{path.name}")


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
    """True when a record says that the launcher's starting the ranks again would not help: the driver decides."""
    return any(not POLICIES[record.kind].is_replaced for record in records)
