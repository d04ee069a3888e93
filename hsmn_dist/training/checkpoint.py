"""Checkpoints that are complete or absent, and the newest complete one.

Every rank writes into a folder aside, flushes and hashes its files; rank 0 writes the manifest last and renames the folder. What a
crash leaves behind has another name and is removed by the next save. Unusual: there is no `latest` pointer to go stale, a damaged
checkpoint is passed over for an older one (said loudly) and set aside, so that it never counts among the last ones that stay, and a
rank that fails to write tells the others, so nobody waits for it.
Nothing is read before its hash was checked, and nothing is pickled. A save in the background copies the state and leaves the writing
to a thread with a process group of its own; the next save waits for it, so at most one copy is held.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from hsmn_dist.distributed.collectives import Group, all_gather_objects, any_rank, background_group, broadcast_object
from hsmn_dist.distributed.determinism import capture_rng
from hsmn_dist.distributed.world import World
from hsmn_dist.foundation.errors import CheckpointError, HsmnError, StageFailed
from hsmn_dist.foundation.files import fsync_folder, sha256_of_file, write_json
from hsmn_dist.foundation.log import logger
from hsmn_dist.training.checkpoint_folder import BEST_PREFIX, STEP_PREFIX, CheckpointFolder
from hsmn_dist.training.checkpoint_state import (
    MANIFEST,
    STATE,
    TrainState,
    read_listing,
    read_state,
    restore_generators,
    rng_name,
)
from hsmn_dist.training.engine import Engine
from hsmn_dist.training.remote_checkpoints import RemoteCheckpoints, UploadReport
from hsmn_dist.training.shard_files import shard_file, weights_alone, write_snapshot

log = logger(__name__)

__all__ = ["MANIFEST", "SAVE_POINTS", "Checkpointer", "TrainState"]

ABANDON_SECONDS = 60.0

SAVE_POINTS = (
    "folder_made",
    "shards_written",
    "hashes_exchanged",
    "state_written",
    "manifest_written",
    "replaced_old",
    "renamed",
    "pruned",
)
"""Every distinct point of a save, in order; tests kill the process at each."""


def _nothing(_: str = "") -> None:
    return None


class Checkpointer:
    """Saves and restores one stage. Every method is collective unless it says otherwise."""

    def __init__(
        self,
        folder: Path,
        world: World,
        keep_last: int = 2,
        may_commit: Callable[[], None] = _nothing,
        at_point: Callable[[str], None] = _nothing,
        remote: RemoteCheckpoints | None = None,
        owner: str = "",
    ) -> None:
        """Prepare; nothing is written.

        Args:
            folder: the stage's checkpoint folder, seen by all ranks.
            world: this rank.
            keep_last: complete checkpoints that stay.
            may_commit: called by rank 0 before it changes what is in the folder; raises when another attempt owns the run.
            at_point: called on every rank at each of `SAVE_POINTS`.
            remote: where complete checkpoints are sent behind the training, and fetched from when `folder` has none;
                given on every rank, used by rank 0.
            owner: who writes: the attempt and its group, the same on every rank.
        """
        self.folder = folder
        self._world = world
        self._names = CheckpointFolder(folder, keep_last, owner, may_commit)
        self._may_commit = may_commit
        self._at_point = at_point
        self._remote = remote
        self._has_asked_remote = False
        self._was_found_sound: set[str] = set()
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None
        self._group: Group | None = None

    def save(self, engine: Engine, state: TrainState, in_background: bool = False) -> Path:
        """Write a checkpoint of `state.step` and remove old ones; returns its place.

        Raises:
            CheckpointError: a rank could not write this one (or, in the background, the one before); all ranks raise,
                and older checkpoints are whole.
        """
        self.wait()
        tensors, header = engine.snapshot()
        facts, rng, best_step = asdict(state), capture_rng(), state.best_step
        name = f"{STEP_PREFIX}{state.step:08d}"

        def work() -> None:
            self._write(name, tensors, header, facts, rng)
            self._send(name)
            if self._world.is_first:
                self._names.prune(name, self._was_found_sound, best_step)
            self._at_point("pruned")

        self._do(work, in_background)
        return self.folder / name

    def save_best(self, engine: Engine, state: TrainState, in_background: bool = False) -> Path:
        """Keep the weights alone as the best so far. Older ones stay while a kept checkpoint speaks of them."""
        self.wait()
        tensors, header = weights_alone(*engine.snapshot())
        name = f"{BEST_PREFIX}{state.best_step:08d}"

        def work() -> None:
            self._write(name, tensors, header, {}, None)
            self._send(name)

        self._do(work, in_background)
        return self.folder / name

    def wait(self) -> None:
        """Return when what was saved in the background is on the disk.

        Raises:
            CheckpointError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def abandon(self) -> None:
        """Let what is being written in the background come to its end, whatever that is; not collective."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            error = pending.exception(ABANDON_SECONDS)
        except FutureTimeoutError:
            error = None
            log.warning("the checkpoint in the background did not end within %g s", ABANDON_SECONDS)
        if error is not None:
            log.warning("the checkpoint in the background was not written: %s", error)

    def _do(self, work: Callable[[], None], in_background: bool) -> None:
        if not in_background:
            work()
            return
        if self._thread is None:
            self._group = background_group()
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending = self._thread.submit(work)

    def restore(self, engine: Engine) -> TrainState | None:
        """Load the newest sound checkpoint into the engine and the random generators; None when there is none.

        At another world size than the one that saved, random states are left as they are.

        Raises:
            CheckpointError: its hashes agree, and yet it holds what this program does not write or what the engine cannot take.
        """
        self.wait()
        path = self.newest()
        if path is None:
            return None
        state, listing = read_state(path), read_listing(path)
        engine.load(path)
        states = [rng_name(rank) for rank in range(self._world.world_size)]  # never as many as a file says
        if listing.world_size == self._world.world_size and listing.files.keys() >= set(states):
            restore_generators(path / states[self._world.rank])
        return state

    def restore_best(self, engine: Engine, state: TrainState) -> bool:
        """Load the best weights (the optimizer's moments are dropped); False when they are not there."""
        self.wait()
        path = self.folder / f"{BEST_PREFIX}{state.best_step:08d}"
        if not self._is_sound(path) and not self._fetch(
            lambda remote: remote.fetch(path.name, self.folder), must=False
        ):
            return False
        engine.load(path)
        return True

    def newest(self) -> Path | None:
        """The newest checkpoint whose every file has its hash; newer ones that are damaged are named in the log and set aside.

        Where the folder has none, the store is asked, once.

        Raises:
            CheckpointError: there is no local checkpoint and the store cannot be read.
            StageFailed: another attempt owns the run.
        """
        self.wait()
        self._together(self._names.put_back, first_rank_alone=True)
        found, damaged = None, []
        for path in broadcast_object(self._names.complete(STEP_PREFIX)):
            if self._is_sound(path):
                found = path
                break
            log.warning("%s is damaged and passed over for an older checkpoint", path)
            damaged.append(path)
        if damaged:
            self._together(lambda: self._names.set_damaged_aside(damaged), first_rank_alone=True)
        if found is not None:
            return found
        if self._has_asked_remote:
            return None
        self._has_asked_remote = True
        return self._fetch(lambda remote: remote.fetch_newest(self.folder), must=True)

    def finish_uploads(self, seconds: float) -> UploadReport | None:
        """Wait at most so long for what is being sent to the store, and say what became of it; None without a store."""
        if self._remote is None:
            return None
        if self._world.is_first and not self._remote.wait(seconds):
            log.warning("%s: an upload is not finished after %g s and is left behind", self._remote.uri, seconds)
        return broadcast_object(self._remote.report)

    def _send(self, name: str) -> None:
        if self._remote is not None and self._world.is_first:
            self._remote.send(self.folder / name)

    def _fetch(self, fetch: Callable[[RemoteCheckpoints], Path | None], must: bool) -> Path | None:
        """What rank 0 fetches, on every rank; with `must` a store that fails raises on all of them."""
        if self._remote is None:
            return None
        path, error = None, None
        if self._world.is_first:
            try:
                path = fetch(self._remote)
            except HsmnError as caught:
                error = caught
                log.warning("%s", caught)
        path, error = broadcast_object((path, error))
        if error is not None and must:
            raise error
        if path is not None:
            self._was_found_sound.add(path.name)
        return path

    def _is_sound(self, path: Path) -> bool:
        """Each rank hashes its share of the files. What this process wrote or checked before is not hashed again."""
        if not broadcast_object((path / MANIFEST).is_file()):
            return False
        if not any_rank(path.name not in self._was_found_sound):
            return True
        try:
            listing = read_listing(path)
            names = sorted(listing.files)[self._world.rank :: self._world.world_size]
            is_damaged = not all(listing.is_as_listed(path, name) for name in names) or STATE not in listing.files
        except (OSError, CheckpointError):
            is_damaged = True
        is_damaged = any_rank(is_damaged)
        if not is_damaged:
            self._was_found_sound.add(path.name)
        return not is_damaged

    def _write(
        self, name: str, tensors: dict[str, Tensor], header: str, state: dict[str, Any], rng: dict[str, Any] | None
    ) -> None:
        rank, aside = self._world.rank, self._names.aside(name)
        self._together(lambda: self._names.begin(name), first_rank_alone=True)
        self._at_point("folder_made")
        own: dict[str, dict[str, Any]] = {}

        def write_own() -> None:
            files = []
            if tensors:
                write_snapshot(aside, rank, tensors, header)
                files.append(shard_file(aside, rank))
            if rng is not None:
                write_json(aside / rng_name(rank), rng)
                files.append(aside / rng_name(rank))
            for file in files:
                own[file.name] = _flushed_entry(file)

        self._together(write_own)
        self._at_point("shards_written")
        entries: dict[str, Any] = {}
        for part in all_gather_objects(own, self._group):
            entries.update(part)
        self._at_point("hashes_exchanged")
        self._together(lambda: self._commit(name, entries, state), first_rank_alone=True)
        self._was_found_sound.add(name)

    def _commit(self, name: str, entries: dict[str, Any], state: dict[str, Any]) -> None:
        aside = self._names.aside(name)
        write_json(aside / STATE, state)
        entries = {**entries, STATE: _flushed_entry(aside / STATE)}
        self._at_point("state_written")
        self._may_commit()
        write_json(aside / MANIFEST, {"files": entries, "world_size": self._world.world_size})
        fsync_folder(aside)
        self._at_point("manifest_written")
        self._names.give_name(name, self._at_point)
        self._at_point("renamed")

    def _together(self, work: Callable[[], None], first_rank_alone: bool = False) -> None:
        """Do `work`, and raise on all ranks when it failed on one; also a barrier."""
        error: Exception | None = None
        if self._world.is_first or not first_rank_alone:
            try:
                work()
            except Exception as caught:
                error = caught
        own = ("", 0) if error is None else (f"rank {self._world.rank}: {error}", getattr(error, "errno", None) or 0)
        fenced = error if isinstance(error, StageFailed) else None
        reports = all_gather_objects((*own, fenced), self._group)
        if error is not None:
            raise error
        for message, number, fenced in reports:
            if fenced is not None:  # cut off together: no rank may take it for a damaged folder
                raise fenced
            if number:  # a full disk is a full disk on every rank, so that all are classified alike
                raise OSError(number, f"{self.folder}: the checkpoint was not written ({message})")
            if message:
                raise CheckpointError(
                    f"{self.folder}: the checkpoint was not written ({message})",
                    allowed="a folder that every rank can write",
                    action="mend what the message names; older checkpoints are whole",
                )


def _flushed_entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return {"sha256": sha256_of_file(path), "bytes": path.stat().st_size}
