"""Checkpoints in an object store, by URI: sent behind the training, fetched when the local copy is gone.

A checkpoint exists there when its `manifest.json` does: files first, manifest last, and a prune removes the manifest first. What
comes back is checked against the manifest's sizes and SHA-256 in a folder aside before it gets its name; names in a manifest are
plain names, so that a store cannot write elsewhere. Unusual: what is to be sent is hard-linked (copied where links are not to be
had) into a folder of its own, so that neither local pruning nor the same step saved again takes a file from under a slow upload; one thread sends, the newest checkpoint that waits takes
the place of an older one that waits, and nothing that the store does can stop or delay a step. Failures are counted and logged.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsmn_dist.config.training import STORE_RULE, store_uri_problem
from hsmn_dist.foundation.errors import CheckpointError, ConfigError, HsmnError, StageFailed
from hsmn_dist.foundation.extras import require
from hsmn_dist.foundation.files import fsync_folder, verify_manifest
from hsmn_dist.foundation.log import logger

log = logger(__name__)

MANIFEST = "manifest.json"
STAGING = ".uploads"
_PLAIN_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
_CHECKPOINT = re.compile(r"^(step|best)_\d{8,}$")
_BLOCK_BYTES = 1 << 22


def check_uri(uri: str) -> str:
    """`uri` without a slash at its end.

    Raises:
        ConfigError: no plain URI of a known store, or one that carries a password.
    """
    if problem := store_uri_problem(uri):
        raise ConfigError(
            f"training.checkpoint_uri: {problem}",
            allowed=STORE_RULE,
            action="name one store; give credentials by the store's own environment variables or files",
        )
    return uri.rstrip("/")


@dataclass
class UploadReport:
    """What became of the uploads of one stage.

    Attributes:
        sent: checkpoints that are complete in the store.
        failed: checkpoints that were given up after every attempt.
        replaced: checkpoints that a newer one took the place of while they waited.
        bytes: sent, of complete checkpoints.
        seconds: spent sending, in the background.
        last_problem: the newest failure in words.
    """

    sent: int = 0
    failed: int = 0
    replaced: int = 0
    bytes: int = 0
    seconds: float = 0.0
    last_problem: str = ""


@dataclass(frozen=True)
class Patience:
    """Attempts for one checkpoint, with waits of `first_wait_seconds`, doubled each time."""

    attempts: int = 3
    first_wait_seconds: float = 1.0
    sleep: Callable[[float], None] = time.sleep


class RemoteCheckpoints:
    """One stage's checkpoints in a store. Used by one rank alone; nothing here is collective."""

    def __init__(
        self,
        uri: str,
        staging: Path,
        keep_last: int = 2,
        may_commit: Callable[[], None] = lambda: None,
        patience: Patience | None = None,
    ) -> None:
        """Prepare; nothing is opened.

        Args:
            uri: of the stage's folder in the store.
            staging: local folder, on the checkpoints' disk, for links to what is being sent; emptied before the first.
            keep_last: complete checkpoints that stay in the store.
            may_commit: called before anything is sent, before a manifest is, and before a fetched checkpoint gets its name; raises when another attempt owns the run.
            patience: how often a checkpoint is tried.
        """
        self.uri = check_uri(uri)
        self.report = UploadReport()
        self._staging = staging
        self._keep_last = keep_last
        self._may_commit = may_commit
        self._patience = patience or Patience()
        self._waiting: dict[str, Path] = {}
        self._changed = threading.Condition()
        self._is_sending = False
        self._thread: threading.Thread | None = None

    # Sending.

    def send(self, folder: Path) -> None:
        """Have a complete local checkpoint sent in the background; returns at once and never raises for the store."""
        try:
            staged = self._stage(folder)
        except OSError as error:
            self._fail(folder.name, f"could not be set aside: {error}")
            return
        kind = folder.name.split("_")[0]
        with self._changed:
            if old := self._waiting.pop(kind, None):
                self.report.replaced += 1
                shutil.rmtree(old.parent, ignore_errors=True)
            self._waiting[kind] = staged
            if self._thread is None:
                # A daemon: a store that hangs for ever must not keep the process from ending.
                self._thread = threading.Thread(target=self._work, name="checkpoint-upload", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Wait at most so long until nothing is left to send; False when something is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._is_sending, seconds)

    def _stage(self, folder: Path) -> Path:
        if self._thread is None:  # what an earlier process left
            shutil.rmtree(self._staging, ignore_errors=True)
        # A step can be saved again, after going back, while its first form is being sent.
        staged = self._staging / uuid.uuid4().hex[:8] / folder.name
        staged.mkdir(parents=True)
        for file in folder.iterdir():
            try:
                os.link(file, staged / file.name)
            except OSError:
                shutil.copyfile(file, staged / file.name)
        return staged

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting))
                # Best weights first: a kept checkpoint speaks of them.
                folder = self._waiting.pop("best" if "best" in self._waiting else next(iter(self._waiting)))
                self._is_sending = True
            self._try_to_send(folder)
            shutil.rmtree(folder.parent, ignore_errors=True)
            with self._changed:
                self._is_sending = False
                self._changed.notify_all()

    def _try_to_send(self, folder: Path) -> None:
        started, patience = time.monotonic(), self._patience
        for attempt in range(patience.attempts):
            if attempt:
                patience.sleep(patience.first_wait_seconds * 2 ** (attempt - 1))
            try:
                num_bytes = self._send(folder)
                self.report.sent += 1
                self.report.bytes += num_bytes
                break
            except StageFailed as error:
                self._fail(folder.name, error.found)  # another attempt owns the run: not to be tried again
                break
            except Exception as error:  # each store's client has errors of its own; none of them may end a run
                problem = f"{type(error).__name__}: {error}"
                log.warning(
                    "%s/%s: attempt %d of %d: %s", self.uri, folder.name, attempt + 1, patience.attempts, problem
                )
        else:
            self._fail(folder.name, problem)
        self.report.seconds += time.monotonic() - started

    def _send(self, folder: Path) -> int:
        store, root = self._open()
        place = f"{root}/{folder.name}"
        names = sorted(file.name for file in folder.iterdir() if file.name != MANIFEST)
        self._may_commit()
        store.makedirs(place, exist_ok=True)
        if store.exists(
            f"{place}/{MANIFEST}"
        ):  # the same step as it was before going back: no longer whole from here on
            store.rm_file(f"{place}/{MANIFEST}")
        for name in names:
            store.put_file(str(folder / name), f"{place}/{name}")
        manifest = (folder / MANIFEST).read_bytes()
        self._may_commit()
        store.pipe_file(f"{place}/{MANIFEST}", manifest)
        try:
            self._prune(store, root, folder.name)
        except Exception as error:  # old checkpoints stay for the next prune; the new one is there
            log.warning("%s: old checkpoints were not removed: %s: %s", self.uri, type(error).__name__, error)
        return len(manifest) + sum((folder / name).stat().st_size for name in names)

    def _prune(self, store: Any, root: str, newest: str) -> None:
        """Keep the last checkpoints and the best weights that they speak of."""
        if not newest.startswith("step_"):
            return
        steps = sorted((name for name in self._complete(store, root) if name.startswith("step_")), reverse=True)
        kept = steps[: self._keep_last]
        wanted = set()
        for name in kept:
            state = _json_of(store.cat_file(f"{root}/{name}/state.json"))
            wanted.add(f"best_{int(state.get('best_step', 0)):08d}")
        for name in self._folders(store, root):
            is_old_best = name.startswith("best_") and name < min(wanted)
            if (name.startswith("step_") and name < kept[-1]) or is_old_best:
                if store.exists(f"{root}/{name}/{MANIFEST}"):
                    store.rm_file(f"{root}/{name}/{MANIFEST}")
                store.rm(f"{root}/{name}", recursive=True)

    def _fail(self, name: str, problem: str) -> None:
        self.report.failed += 1
        self.report.last_problem = f"{self.uri}/{name}: {problem}"
        log.warning("%s/%s was not uploaded and is given up (%s); training goes on", self.uri, name, problem)

    # Fetching.

    def names(self) -> list[str]:
        """Complete checkpoints in the store, newest first.

        Raises:
            CheckpointError: the store cannot be read.
        """
        try:
            store, root = self._open()
            found = self._complete(store, root)
        except CheckpointError:
            raise
        except Exception as error:
            raise self._unreadable(error) from error
        return sorted((name for name in found if name.startswith("step_")), reverse=True)

    def fetch_newest(self, folder: Path) -> Path | None:
        """Bring the newest sound checkpoint into `folder`; None where the store has none.

        Raises:
            CheckpointError: the store cannot be read, or everything in it is damaged.
        """
        names, problem = self.names(), None
        for name in names:
            try:
                return self.fetch(name, folder)
            except CheckpointError as error:
                problem = error
                log.warning("%s is passed over for an older one: %s", name, error.found)
        if problem is not None:
            raise problem
        return None

    def fetch(self, name: str, folder: Path) -> Path:
        """Bring one checkpoint, checked against its manifest before it gets its name.

        Raises:
            CheckpointError: absent, damaged, or the store cannot be read.
        """
        aside, final = folder / f".{name}.{uuid.uuid4().hex[:8]}.tmp-fetch", folder / name
        aside.mkdir(parents=True)
        try:
            self._fetch_into(name, aside)
            verify_manifest(aside, MANIFEST)
            self._may_commit()
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            fsync_folder(folder)
        except HsmnError:
            raise
        except Exception as error:
            raise self._unreadable(error) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        log.info("fetched %s/%s", self.uri, name)
        return final

    def _fetch_into(self, name: str, aside: Path) -> None:
        store, root = self._open()
        manifest = store.cat_file(f"{root}/{name}/{MANIFEST}")
        entries = _json_of(manifest).get("files")
        if not isinstance(entries, dict) or not all(
            isinstance(file, str) and _PLAIN_NAME.match(file) and isinstance(entry, dict) and "sha256" in entry
            for file, entry in entries.items()
        ):
            raise CheckpointError(
                f"{self.uri}/{name}/{MANIFEST}: names files that are no plain names, or no files",
                allowed="a manifest that this program wrote",
                action="remove that checkpoint from the store; an older one is used",
            )
        (aside / MANIFEST).write_bytes(manifest)
        for file in entries:
            with store.open(f"{root}/{name}/{file}", "rb") as source, (aside / file).open("wb") as target:
                shutil.copyfileobj(source, target, _BLOCK_BYTES)

    def _open(self) -> tuple[Any, str]:
        fsspec = require("fsspec")
        try:
            store, root = fsspec.core.url_to_fs(self.uri)
        except ImportError as error:
            raise CheckpointError(
                f"{self.uri}: {error}",
                allowed="an environment with the package for this store (s3fs for s3://, gcsfs for gs://, adlfs for abfs://)",
                action="install it with pip",
            ) from error
        return store, str(root).rstrip("/")

    def _complete(self, store: Any, root: str) -> list[str]:
        return [name for name in self._folders(store, root) if store.exists(f"{root}/{name}/{MANIFEST}")]

    def _folders(self, store: Any, root: str) -> list[str]:
        store.invalidate_cache()
        if not store.exists(root):
            return []
        names = (str(path).rstrip("/").rsplit("/", 1)[-1] for path in store.ls(root, detail=False))
        return sorted(name for name in names if _CHECKPOINT.match(name))

    def _unreadable(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.uri}: {type(error).__name__}: {error}",
            allowed="a store that can be read",
            action="check the URI, the network and the credentials; or unset training.checkpoint_uri to begin anew",
        )


def _json_of(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise CheckpointError(
            f"a file in the store that is no JSON ({error})",
            allowed="what this program wrote",
            action="remove that checkpoint from the store; an older one is used",
        ) from error
    return value if isinstance(value, dict) else {}
