"""Fencing: who may commit to a run folder.

Each start or resume of a run is an attempt with a token; each group of ranks that an attempt starts has a number. A group that was cut
off (its network failed, its machine was believed dead) may come back while its replacement trains: it finds that `attempt.json` no
longer names it, and may not commit a checkpoint, a journal line or a result.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import Any

from hsmn_dist.foundation.errors import StageFailed
from hsmn_dist.foundation.files import read_json, write_json
from hsmn_dist.orchestration.run_folder import RunFolder


def new_attempt(folder: RunFolder) -> str:
    """Begin an attempt; every earlier one is fenced off from now on."""
    token = secrets.token_hex(4)
    write_json(folder.attempt, {"token": token, "group": 0, "started": time.time()})
    return token


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
            raise StageFailed(
                f"attempt {self.attempt}, group {self.group} was replaced by attempt {owner[0]}, group {owner[1]}: "
                "this process was cut off and may not commit",
                allowed="commits of the newest group",
                action="nothing to do: the newer group goes on",
                kind="fenced",
            )


def claim(folder: RunFolder, attempt: str) -> Fence:
    """Make the calling group (its rank 0 calls) the owner of an attempt.

    Raises:
        StageFailed: the attempt itself was replaced.
    """
    current: dict[str, Any] = read_json(folder.attempt)
    if current["token"] != attempt:
        Fence(folder, attempt, -1).check()
    group = int(current["group"]) + 1
    write_json(folder.attempt, {**current, "group": group})
    return Fence(folder, attempt, group)
