"""Fencing: who may commit to a run folder.

Each start or resume of a run is an attempt with a token; each group of ranks that an attempt starts has a number. A group that was cut
off (its network failed, its machine was believed dead) may come back while its replacement trains: it finds that `attempt.json` no
longer names it, and may not commit a checkpoint, a journal line or a result. The same holds for a driver that was
replaced.

Unusual: whoever changes `attempt.json` holds a lock on a file beside it, so that a group of an older attempt, stopped between its
look and its write, cannot take the run back. Readers need no lock: the file is replaced as a whole.
"""

from __future__ import annotations

import errno
import fcntl
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from hsmn_dist.foundation.errors import StageFailed
from hsmn_dist.foundation.files import read_json, write_json
from hsmn_dist.foundation.log import logger
from hsmn_dist.orchestration.run_folder import RunFolder

log = logger(__name__)

LOCK_SECONDS = 30.0
IS_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


def new_attempt(folder: RunFolder) -> str:
    """Begin an attempt; every earlier one is fenced off from now on."""
    token = secrets.token_hex(4)
    with _locked(folder):
        write_json(folder.attempt, {"token": token, "group": 0, "started": time.time()})
    return token


def present_attempt(folder: RunFolder) -> str:
    """Token of the attempt that owns the run."""
    return str(read_json(folder.attempt)["token"])


def check_attempt(folder: RunFolder, attempt: str) -> None:
    """Return when this attempt, whatever its group, still owns the run: what a driver asks before it writes.

    Raises:
        StageFailed: another attempt owns it; nothing was written.
    """
    owner = present_attempt(folder)
    if owner != attempt:
        raise _replaced(f"attempt {attempt}", f"attempt {owner}")


def _replaced(former: str, owner: str) -> StageFailed:
    return StageFailed(
        f"{former} was replaced by {owner}: this process was cut off and may not commit",
        allowed="commits of the newest group",
        action="nothing to do: the newer group goes on",
        kind="fenced",
    )


@contextmanager
def _locked(folder: RunFolder) -> Iterator[None]:
    """Hold the lock on `attempt.json`. Where the storage knows no locks, that is said and the change is made without."""
    with folder.attempt_lock.open("ab") as stream:
        _lock(stream, folder)
        yield  # closing the file gives the lock back


def _lock(stream: IO[bytes], folder: RunFolder) -> None:
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in IS_HELD:
                log.warning("%s: this storage takes no locks (%s); going on without", folder.attempt_lock, error)
                return
            if time.monotonic() > deadline:
                raise StageFailed(
                    f"{folder.attempt_lock} has been locked by another process for {LOCK_SECONDS:g} s",
                    allowed="a lock that is held for the moment of one write",
                    action="end the process that holds it (a stopped one never lets go), then start the same command again",
                ) from None
        time.sleep(0.02)


@dataclass(frozen=True)
class Fence:
    """The right of one group of ranks to commit."""

    folder: RunFolder
    attempt: str
    group: int

    def check(self) -> None:
        """Return when this group still owns the run.

        Raises:
            StageFailed: another attempt or group owns it; nothing was written.
        """
        current: dict[str, Any] = read_json(self.folder.attempt)
        owner = (current["token"], current["group"])
        if owner != (self.attempt, self.group):
            raise _replaced(f"attempt {self.attempt}, group {self.group}", f"attempt {owner[0]}, group {owner[1]}")


def claim(folder: RunFolder, attempt: str) -> Fence:
    """Make the calling group (its rank 0 calls) the owner of an attempt.

    Raises:
        StageFailed: the attempt itself was replaced.
    """
    with _locked(folder):
        current: dict[str, Any] = read_json(folder.attempt)
        check_attempt(folder, attempt)
        group = int(current["group"]) + 1
        write_json(folder.attempt, {**current, "group": group})
    return Fence(folder, attempt, group)
