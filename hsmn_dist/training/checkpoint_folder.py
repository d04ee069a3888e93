"""The names in a stage's checkpoint folder: complete, aside, damaged, old. Rank 0's part of `checkpoint`; nothing here is collective.

A name with a dot before it is no checkpoint: `.NAME.OWNER.tmp-save` is being written, `.NAME.OWNER.tmp-old` was put away while
another one takes its name, `.NAME.OWNER.tmp-pruned` is being removed, `.damaged-NAME` was found damaged. Unusual: what is to be
removed is listed before the right to commit is asked for. Whoever has the right then owns everything that was there before, so a
process that was cut off in between, and wakes up beside its successor, touches nothing that the successor has made.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from hsmn_dist.foundation.files import fsync_folder
from hsmn_dist.foundation.log import logger
from hsmn_dist.training.checkpoint_state import MANIFEST, read_state, step_of

log = logger(__name__)

STEP_PREFIX = "step_"
BEST_PREFIX = "best_"
DAMAGED = ".damaged-"
_NAME = re.compile(r"^(step|best)_\d{8,20}$")
_SAVED, _REPLACED, _PRUNED = ".tmp-save", ".tmp-old", ".tmp-pruned"


class CheckpointFolder:
    """One stage's folder, as one attempt's group of ranks sees it."""

    def __init__(self, path: Path, keep_last: int, owner: str, may_commit: Callable[[], None]) -> None:
        """Prepare; nothing is written.

        Args:
            path: the folder.
            keep_last: complete checkpoints that stay.
            owner: who writes here, the same on every rank and another one for every attempt and group; plain letters.
            may_commit: raises when another attempt or group owns the run.
        """
        self.path = path
        self._keep_last = keep_last
        self._mark = f".{owner}" if owner else ""
        self._may_commit = may_commit

    def complete(self, prefix: str) -> list[Path]:
        """What has a manifest, newest first."""
        found = [path for path in self.path.glob(f"{prefix}*") if _NAME.match(path.name)]
        return sorted((path for path in found if (path / MANIFEST).is_file()), key=step_of, reverse=True)

    def aside(self, name: str) -> Path:
        """Where a checkpoint is written before it has its name."""
        return self.path / f".{name}{self._mark}{_SAVED}"

    def begin(self, name: str) -> None:
        """Clear away what dead writers left, and make the place for a checkpoint.

        Raises:
            StageFailed: another attempt owns the run; nothing was touched.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        left = sorted(self.path.glob(".*.tmp-*"))
        self._may_commit()
        _put_back(left)
        for path in left:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        self.aside(name).mkdir()

    def put_back(self) -> None:
        """A writer that died between putting a checkpoint away and giving its name to another one left it aside."""
        left = sorted(self.path.glob(f".*{_REPLACED}"))
        if left:
            self._may_commit()
            _put_back(left)

    def give_name(self, name: str, at_point: Callable[[str], None]) -> None:
        """Give what was written aside its name.

        Raises:
            StageFailed: another attempt owns the run; its checkpoints are as they were.
        """
        final, old = self.path / name, self.path / f".{name}{self._mark}{_REPLACED}"
        was_there = final.exists()
        self._may_commit()
        if was_there:
            # The same step was saved before (and left behind by going back).
            final.rename(old)
            at_point("replaced_old")
        self.aside(name).rename(final)
        fsync_folder(self.path)
        shutil.rmtree(old, ignore_errors=True)

    def set_damaged_aside(self, paths: Iterable[Path]) -> None:
        """Under another name: a damaged checkpoint never again counts as one of the newest. It is there to be looked at."""
        self._may_commit()
        for path in paths:
            away = path.with_name(f"{DAMAGED}{path.name}")
            try:
                shutil.rmtree(away, ignore_errors=True)
                path.rename(away)
            except OSError as error:
                log.warning("%s is damaged and could not be renamed: %s", path, error)

    def prune(self, written: str, sound: Collection[str], best_step: int) -> None:
        """Remove old checkpoints, and best weights that no kept one speaks of. Never raises: what was saved is saved.

        Args:
            written: the checkpoint that was just written.
            sound: names that were written or checked by this process. Others are removed too, but never counted among
                the last ones that stay: they may be damaged.
            best_step: whose weights stay in any case.
        """
        try:
            self._may_commit()
            self._prune(written, sound, best_step)
        except Exception as error:  # the next save tries again; no old checkpoint is worth a run
            log.warning("%s: old checkpoints were not removed: %s: %s", self.path, type(error).__name__, error)

    def _prune(self, written: str, sound: Collection[str], best_step: int) -> None:
        kept: list[Path] = []
        num_sound = 0
        for path in self.complete(STEP_PREFIX):
            if num_sound >= self._keep_last and path.name != written:
                self._remove(path)
                continue
            kept.append(path)
            num_sound += path.name in sound
        wanted = {best_step, *(read_state(path).best_step for path in kept)}
        for path in self.complete(BEST_PREFIX):
            if step_of(path) not in wanted:
                self._remove(path)
        for path in self.path.glob(f"{DAMAGED}*"):
            if num_sound >= self._keep_last and step_of(path) <= step_of(kept[-1]):
                shutil.rmtree(path, ignore_errors=True)

    def _remove(self, path: Path) -> None:
        """Under another name first: what has a checkpoint's name is never half removed."""
        away = path.with_name(f".{path.name}{self._mark}{_PRUNED}")
        try:
            path.rename(away)
            shutil.rmtree(away)
        except OSError as error:
            log.warning("%s was not removed: %s", path, error)


def _put_back(left: Iterable[Path]) -> None:
    for away in left:
        final = away.with_name(away.name[1:].split(".", 1)[0])
        if away.name.endswith(_REPLACED) and not final.exists():
            away.rename(final)
