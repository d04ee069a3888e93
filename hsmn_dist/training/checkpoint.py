"""Checkpoints that are complete or absent, and the newest complete one.

Every rank writes into a folder aside, flushes and hashes its files; rank 0 writes the manifest last and renames the folder. What a
crash leaves behind has another name and is removed by the next save. Unusual: there is no `latest` pointer to go stale, a damaged
checkpoint is passed over for an older one (said loudly), and a rank that fails to write tells the others, so nobody waits for it.
Nothing is read before its hash was checked, and nothing is pickled. A save in the background copies the state and leaves the writing
to a thread with a process group of its own; the next save waits for it, so at most one copy is held.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from hsmn_dist.distributed.collectives import Group, all_gather_objects, any_rank, background_group, broadcast_object
from hsmn_dist.distributed.determinism import capture_rng, restore_rng
from hsmn_dist.distributed.world import World
from hsmn_dist.foundation.errors import CheckpointError, HsmnError
from hsmn_dist.foundation.files import (
    fsync_folder,
    read_json,
    remove_leftovers,
    sha256_of_file,
    write_json,
)
from hsmn_dist.foundation.log import logger
from hsmn_dist.training.engine import Engine
from hsmn_dist.training.remote_checkpoints import RemoteCheckpoints, UploadReport
from hsmn_dist.training.shard_files import shard_file, weights_alone, write_snapshot

log = logger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"
STEP_PREFIX = "step_"
BEST_PREFIX = "best_"
REPLACED = ".tmp-old"
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


@dataclass
class TrainState:
    """Where a stage stands, but for weights, moments and random states. JSON.

    Attributes:
        step: optimizer steps done.
        cursor: the stream's position (`Cursor.to_json`), None before the first batch.
        best_loss: lowest validation loss so far, None before the first validation.
        best_step: the step it was measured at; its weights are in `best_NNNNNNNN`.
        num_bad_validations: validations since then.
        validations: (step, loss) of each validation.
        num_tokens: target tokens trained on.
        num_examples: examples trained on.
        num_skipped_steps: steps whose gradient was not applied.
        num_rollbacks: times that training went back to a checkpoint.
        recent_losses: the losses that the spike detector looks at.
    """

    step: int = 0
    cursor: dict[str, Any] | None = None
    best_loss: float | None = None
    best_step: int = 0
    num_bad_validations: int = 0
    validations: list[tuple[int, float]] = field(default_factory=list)
    num_tokens: int = 0
    num_examples: int = 0
    num_skipped_steps: int = 0
    num_rollbacks: int = 0
    recent_losses: list[float] = field(default_factory=list)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> TrainState:
        """Inverse of `dataclasses.asdict`; unknown keys are an error, missing ones keep their default."""
        names = {entry.name for entry in fields(cls)}
        if unknown := sorted(set(value) - names):
            raise CheckpointError(
                f"a training state with the keys {unknown}",
                allowed=", ".join(sorted(names)),
                action="resume with the program version that wrote the checkpoint",
            )
        state = cls(**value)
        state.validations = [(int(step), float(loss)) for step, loss in state.validations]
        return state


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
    ) -> None:
        """Prepare; nothing is written.

        Args:
            folder: the stage's checkpoint folder, seen by all ranks.
            world: this rank.
            keep_last: complete checkpoints that stay.
            may_commit: called by rank 0 before a rename; raises when another attempt owns the run.
            at_point: called on every rank at each of `SAVE_POINTS`.
            remote: where complete checkpoints are sent behind the training, and fetched from when `folder` has none;
                given on every rank, used by rank 0.
        """
        self.folder = folder
        self._world = world
        self._keep_last = keep_last
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
            self._prune(best_step)

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
        """
        self.wait()
        path = self.newest()
        if path is None:
            return None
        engine.load(path)
        own = path / _rng_name(self._world.rank)
        if len(list(path.glob("rng_*.json"))) == self._world.world_size:
            restore_rng(read_json(own))
        return TrainState.from_json(read_json(path / STATE))

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
        """The newest checkpoint whose every file has its hash; damaged ones are named in the log.

        Where the folder has none, the store is asked, once.

        Raises:
            CheckpointError: there is no local checkpoint and the store cannot be read.
        """
        self.wait()
        if self._world.is_first:
            self._put_back()
        for path in broadcast_object(self._complete(STEP_PREFIX)):
            if self._is_sound(path):
                return path
            log.warning("%s is damaged and passed over for an older checkpoint", path)
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

    def _complete(self, prefix: str) -> list[Path]:
        found = [path for path in self.folder.glob(f"{prefix}*") if (path / MANIFEST).is_file()]
        return sorted(found, key=_step_of, reverse=True)

    def _is_sound(self, path: Path) -> bool:
        """Each rank hashes its share of the files. What this process wrote or checked before is not hashed again."""
        if not broadcast_object((path / MANIFEST).is_file()):
            return False
        if not any_rank(path.name not in self._was_found_sound):
            return True
        try:
            entries: dict[str, Any] = read_json(path / MANIFEST)["files"]
            names = sorted(entries)[self._world.rank :: self._world.world_size]
            is_damaged = any(sha256_of_file(path / name) != entries[name]["sha256"] for name in names)
        except (OSError, CheckpointError, KeyError, TypeError):
            is_damaged = True
        is_damaged = any_rank(is_damaged)
        if not is_damaged:
            self._was_found_sound.add(path.name)
        return not is_damaged

    def _write(
        self, name: str, tensors: dict[str, Tensor], header: str, state: dict[str, Any], rng: dict[str, Any] | None
    ) -> None:
        rank, aside = self._world.rank, self.folder / f".{name}.tmp-save"
        self._together(lambda: self._make_folder(aside), first_rank_alone=True)
        self._at_point("folder_made")
        own: dict[str, dict[str, Any]] = {}

        def write_own() -> None:
            files = []
            if tensors:
                write_snapshot(aside, rank, tensors, header)
                files.append(shard_file(aside, rank))
            if rng is not None:
                write_json(aside / _rng_name(rank), rng)
                files.append(aside / _rng_name(rank))
            for file in files:
                own[file.name] = _flushed_entry(file)

        self._together(write_own)
        self._at_point("shards_written")
        entries: dict[str, Any] = {}
        for part in all_gather_objects(own, self._group):
            entries.update(part)
        self._at_point("hashes_exchanged")
        self._together(lambda: self._commit(aside, self.folder / name, entries, state), first_rank_alone=True)
        self._was_found_sound.add(name)

    def _put_back(self) -> None:
        """A writer that died between putting a checkpoint away and giving its name to another one left it under `REPLACED`."""
        for away in self.folder.glob(f".*{REPLACED}"):
            final = self.folder / away.name[1 : -len(REPLACED)]
            if not final.exists():
                away.rename(final)

    def _make_folder(self, aside: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._put_back()
        remove_leftovers(self.folder)
        aside.mkdir()

    def _commit(self, aside: Path, final: Path, entries: dict[str, Any], state: dict[str, Any]) -> None:
        write_json(aside / STATE, state)
        entries = {**entries, STATE: _flushed_entry(aside / STATE)}
        self._at_point("state_written")
        self._may_commit()
        write_json(aside / MANIFEST, {"files": entries, "world_size": self._world.world_size})
        fsync_folder(aside)
        self._at_point("manifest_written")
        if final.exists():
            # The same step was saved before (and found damaged, or left behind by going back).
            final.rename(self.folder / f".{final.name}{REPLACED}")
            self._at_point("replaced_old")
        aside.rename(final)
        fsync_folder(self.folder)
        remove_leftovers(self.folder)
        self._at_point("renamed")

    def _prune(self, best_step: int) -> None:
        if self._world.is_first:
            complete = self._complete(STEP_PREFIX)
            for path in complete[self._keep_last :]:
                self._remove(path)
            wanted = {best_step}
            for path in complete[: self._keep_last]:
                wanted.add(int(read_json(path / STATE)["best_step"]))
            for path in self._complete(BEST_PREFIX):
                if _step_of(path) not in wanted:
                    self._remove(path)
        self._at_point("pruned")

    def _remove(self, path: Path) -> None:
        """Under another name first: what has a checkpoint's name is never half removed."""
        aside = path.with_name(f".{path.name}.tmp-pruned")
        path.rename(aside)
        shutil.rmtree(aside)

    def _together(self, work: Callable[[], None], first_rank_alone: bool = False) -> None:
        """Do `work`, and raise on all ranks when it failed on one; also a barrier."""
        error: Exception | None = None
        if self._world.is_first or not first_rank_alone:
            try:
                work()
            except Exception as caught:
                error = caught
        own = ("", 0) if error is None else (f"rank {self._world.rank}: {error}", getattr(error, "errno", None) or 0)
        reports = all_gather_objects(own, self._group)
        if error is not None:
            raise error
        for message, number in reports:
            if number:  # a full disk is a full disk on every rank, so that all are classified alike
                raise OSError(number, f"{self.folder}: the checkpoint was not written ({message})")
            if message:
                raise CheckpointError(
                    f"{self.folder}: the checkpoint was not written ({message})",
                    allowed="a folder that every rank can write",
                    action="mend what the message names; older checkpoints are whole",
                )


def _rng_name(rank: int) -> str:
    return f"rng_{rank:05d}.json"


def _step_of(path: Path) -> int:
    return int(path.name.rsplit("_", 1)[1])


def _flushed_entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return {"sha256": sha256_of_file(path), "bytes": path.stat().st_size}
