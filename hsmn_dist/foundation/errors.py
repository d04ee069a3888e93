"""The exception tree of the project; every message has three parts.

`found` says what was met and where (file, line, configuration path, shard, rank), `allowed` says what would have been
accepted, and `action` says what the reader should do next. The command line prints the three parts and turns the class
into an exit code; a user's mistake never shows a traceback. Secrets in any of the three are hidden when the error is made, so that no
log, journal or failure record can carry them on.
"""

from __future__ import annotations

from typing import Any, ClassVar

from hsmn_dist.foundation.redact import redact


class HsmnError(Exception):
    """Root of every error that this project raises on purpose."""

    exit_code: ClassVar[int] = 1

    def __init__(self, found: str, *, allowed: str, action: str) -> None:
        self.found = redact(found)
        self.allowed = redact(allowed)
        self.action = redact(action)
        super().__init__(f"{self.found}\n  allowed: {self.allowed}\n  do: {self.action}")

    def __reduce__(self) -> tuple[Any, ...]:
        # Keyword-only arguments would otherwise be lost when the error crosses a process line.
        return (_rebuild, (type(self), self.found, self.allowed, self.action))


def _rebuild(kind: type[HsmnError], found: str, allowed: str, action: str) -> HsmnError:
    return kind(found, allowed=allowed, action=action)


class ConfigError(HsmnError):
    """A configuration or a command line that cannot be used. Raised by `config` and `cli`; fix the file and run again."""

    exit_code = 2


class DataError(HsmnError):
    """Input rows, shards or tokenizers that cannot be used. Raised by `data`; the file and row are named."""

    exit_code = 2


class ModelError(HsmnError):
    """A model given shapes, tokens or a state that it cannot take. Raised by `models` and `optim`."""

    exit_code = 2


class CheckpointError(HsmnError):
    """A checkpoint, weights file or Fisher store that is incomplete, damaged, or belongs to something else."""

    exit_code = 2


class PlanError(HsmnError):
    """A run that cannot fit the machines asked for. Raised before any device is taken."""

    exit_code = 2


class MissingExtraError(HsmnError):
    """An optional package is needed and absent. Raised by `foundation.extras`; the message has the install command."""

    exit_code = 2


class SandboxError(HsmnError):
    """Model-written code cannot be run safely here. Raised by `evaluation.sandbox`."""

    exit_code = 2


class StageFailed(HsmnError):
    """A curriculum stage stopped before its end.

    `kind` is a `orchestration.failures.FailureKind` value; `rank` is the first rank that failed, or -1 when no rank could
    be blamed. Raised at the process boundary only, so the reader always learns which rank and what it was doing.
    """

    exit_code = 1

    def __init__(
        self,
        found: str,
        *,
        allowed: str = "a stage that runs to its last step",
        action: str = "read the message, mend the cause, and resume with `hsmn-dist run --resume RUN`",
        kind: str = "unknown",
        rank: int = -1,
    ) -> None:
        super().__init__(found, allowed=allowed, action=action)
        self.kind = kind
        self.rank = rank

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild_stage_failed, (self.found, self.allowed, self.action, self.kind, self.rank))


def _rebuild_stage_failed(found: str, allowed: str, action: str, kind: str, rank: int) -> StageFailed:
    return StageFailed(found, allowed=allowed, action=action, kind=kind, rank=rank)


class Preempted(HsmnError):
    """The machine asked the run to go away; a checkpoint was written. Exit code 75 means: start the same command again."""

    exit_code = 75
