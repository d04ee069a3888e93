"""Shards that lie at a URL: fetched whole, checked on arrival, kept in a bounded local cache.

A fetched file gets its name only after its SHA-256 agreed with the index, so what has the name can be trusted by every
process of the machine; a lock per file makes the ranks of a node fetch it once. Broken connections and wrong hashes are tried
again with growing waits; a store that stays away is a failure that passes and never a damaged sample, so that no outage is
mistaken for bad data and passed over. What is unusual: the cache is one folder of plain files shared by all runs, cut back by last use.
Only known schemes are opened: no `pipe:`, no chained URLs.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hsmn_dist.data.shards.index import INDEX_NAME, ShardEntry, ShardIndex, load_index
from hsmn_dist.foundation.errors import DataError, HsmnError, StageFailed
from hsmn_dist.foundation.extras import require
from hsmn_dist.foundation.files import atomic_path, sha256_of_file
from hsmn_dist.foundation.log import logger

SCHEMES = ("s3", "gs", "gcs", "http", "https", "file", "memory")
_URL = re.compile(r"^([a-z][a-z0-9+.-]*)(::|:)")
_BLOCK_BYTES = 1 << 20
_LOG = logger(__name__)


FETCH_ATTEMPTS = 8
FEW_ATTEMPTS = 5
"""Enough for what another attempt rarely mends: a file that is not there, no permission, other bytes than the index says."""
_LOCAL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class FetchFailed(DataError):
    """A file of a URL that is not there, may not be read, or holds other bytes, at every attempt."""


class StoreAway(StageFailed):
    """A store that gave no answer to any attempt. It may come back: the kind has retries of its own."""

    def __init__(self, found: str) -> None:
        super().__init__(
            found,
            allowed="a store that answers within data.fetch_attempts attempts",
            action="check the network and the store, raise data.fetch_attempts for longer outages, and resume the run",
            kind="store_away",
        )


class CacheSettings(Protocol):
    """The settings that say how files of a URL come: `config.data.DataConfig` and `stream.plan.StreamSettings` have them."""

    @property
    def cache_folder(self) -> str:
        """Where they stay; empty: `own_cache_folder`."""
        ...

    @property
    def cache_bytes(self) -> int:
        """Size to which the cache is cut back."""
        ...

    @property
    def fetch_attempts(self) -> int:
        """Attempts at a store that does not answer."""
        ...


@dataclass(frozen=True)
class ShardCache:
    """How files of a URL come, for callers without a configuration; see `CacheSettings`."""

    cache_folder: str = ""
    cache_bytes: int = 16 * 2**30
    fetch_attempts: int = FETCH_ATTEMPTS


OWN_CACHE = ShardCache()


@dataclass(frozen=True)
class Retry:
    """How often and how patiently a fetch is tried: waits of `first_wait_seconds`, doubled each time up to the longest."""

    attempts: int = FETCH_ATTEMPTS
    first_wait_seconds: float = 0.5
    longest_wait_seconds: float = 30.0
    sleep: Callable[[float], None] = time.sleep

    def wait_seconds(self, attempt: int) -> float:
        """The wait after failed attempt number `attempt` (from 0)."""
        return min(self.first_wait_seconds * 2**attempt, self.longest_wait_seconds)


def folder_name(folder: Path | str) -> str:
    """The folder's name as text. A `Path` made of a URL has lost slashes, which are given back."""
    text = str(folder)
    scheme, colon, rest = text.partition(":/")
    if isinstance(folder, Path) and colon and scheme in SCHEMES and not rest.startswith("/"):
        return f"file:///{rest}" if scheme == "file" else f"{scheme}://{rest}"
    return text


def is_url(folder: Path | str) -> bool:
    """Whether a folder is named by a URL (or by something that looks like one and will be refused)."""
    return _URL.match(folder_name(folder)) is not None


def require_known_scheme(url: str) -> None:
    """Refuse what is no plain URL of a known kind.

    Raises:
        DataError: the scheme is not in `SCHEMES`, or several are chained.
    """
    match = _URL.match(url)
    scheme = match.group(1) if match else ""
    if scheme not in SCHEMES or "::" in url or "://" not in url:
        raise DataError(
            f"folder {url!r}",
            allowed="a local folder, or a URL of " + ", ".join(f"{name}://" for name in SCHEMES),
            action="correct the folder; commands and chained URLs are never opened",
        )


def own_cache_folder() -> Path:
    """The cache where the configuration names none: a folder of this user's alone in the system's temporary folder.

    Anybody can guess the name and make it first, and whoever owns it could exchange its files behind their check.

    Raises:
        DataError: there is something of that name that is no folder, belongs to another user, or that others may write.
    """
    folder = Path(tempfile.gettempdir()) / f"hsmn_dist-shards-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    problem = ""
    if not stat.S_ISDIR(status.st_mode):
        problem = "is no folder"
    elif status.st_uid != os.getuid():
        problem = f"belongs to user {status.st_uid}"
    elif status.st_mode & 0o022:
        problem = f"may be written by others (mode {stat.S_IMODE(status.st_mode):04o})"
    if problem:
        raise DataError(
            f"{folder}, the cache of fetched shards, {problem}",
            allowed="a folder of this user's own, mode 0700",
            action="set data.cache_folder to another one, or remove this one",
        )
    return folder


class RemoteFiles:
    """The files of a prepared folder at a URL, as local files.

    Args:
        url: of the folder.
        cache_folder: shared by all URLs and processes of the machine.
        cache_bytes: size to which the cache's shards are cut back after each fetch (the newest one always stays).
        retry: attempts and waits.
    """

    def __init__(self, url: str, cache_folder: Path, cache_bytes: int, retry: Retry | None = None) -> None:
        require_known_scheme(url)
        self._url = url.rstrip("/")
        self._cache_folder = cache_folder
        self._cache_bytes = cache_bytes
        self._retry = retry or Retry()
        self.folder = cache_folder / hashlib.sha256(self._url.encode()).hexdigest()[:16]
        self.num_fetched = 0
        self.num_retries = 0

    def fetch_index(self) -> ShardIndex:
        """Bring `index.json` (always anew: it alone has no hash to be checked against) and the samples files."""
        self._fetch(INDEX_NAME, None)
        index = load_index(self.folder)
        for split in index.splits.values():
            path = self.folder / split.samples_file
            if not path.is_file() or sha256_of_file(path) != split.samples_sha256:
                self._fetch(split.samples_file, split.samples_sha256)
        return index

    def path(self, shard: ShardEntry) -> Path:
        """The shard as a local file, fetched if it is not there.

        Raises:
            FetchFailed: it is not there or not what was written, at every attempt.
            StoreAway: the store did not answer any.
        """
        path = self._local(shard)
        for _ in range(2):  # another process may remove the file between the look and the touch
            if path.is_file() and path.stat().st_size == shard.bytes:
                with suppress(FileNotFoundError):
                    path.touch()  # its last use, which decides what leaves the cache first
                    return path
            self._fetch_once(shard)
        return path

    def _fetch_once(self, shard: ShardEntry) -> None:
        path = self._local(shard)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f".{shard.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.is_file() and path.stat().st_size == shard.bytes:
                return
            self._fetch(shard.name, shard.sha256, path)
        self._cut_back(keep=path)

    def _local(self, shard: ShardEntry) -> Path:
        # Named by its content too: a folder prepared anew at the same URL never meets shards of the old one.
        return self.folder / f"{shard.sha256[:16]}-{shard.name}"

    def _fetch(self, name: str, sha256: str | None, path: Path | None = None) -> None:
        problem, is_away, attempts, attempt = "", False, self._retry.attempts, 0
        while attempt < attempts:
            if attempt:
                self.num_retries += 1
                self._retry.sleep(self._retry.wait_seconds(attempt - 1))
            try:
                self._copy(name, sha256, path or self.folder / name)
                self.num_fetched += 1
                return
            except HsmnError:
                raise
            except Exception as error:  # each store's client has errors of its own; all are tried again and reported
                if isinstance(error, OSError) and error.errno in _LOCAL_ERRORS:
                    raise  # our disk, and not the store
                problem, is_away = f"{type(error).__name__}: {error}", not _is_an_answer(error)
                attempts = self._retry.attempts if is_away else min(self._retry.attempts, FEW_ATTEMPTS)
            attempt += 1
            _LOG.warning("%s/%s: attempt %d of %d: %s", self._url, name, attempt, attempts, problem)
        found = f"{self._url}/{name}: {problem} (after {attempt} attempts)"
        if is_away:
            raise StoreAway(found)
        raise FetchFailed(
            found,
            allowed="a reachable file with the bytes that were written",
            action="check the URL and the network; copy the folder again if the hash differs",
        )

    def _copy(self, name: str, sha256: str | None, path: Path) -> None:
        # Whole file to a name of its own; it gets the real name only with the right hash.
        digest = hashlib.sha256()
        with atomic_path(path) as aside:
            with _open_url(f"{self._url}/{name}") as source, aside.open("wb") as target:
                while block := source.read(_BLOCK_BYTES):
                    digest.update(block)
                    target.write(block)
            found = digest.hexdigest()
            if sha256 not in (None, found):
                raise OtherBytes(f"arrived with SHA-256 {found[:12]}..., the index says {str(sha256)[:12]}...")

    def _cut_back(self, keep: Path) -> None:
        files = []
        for path in self._cache_folder.glob("*/*.tar"):
            with suppress(FileNotFoundError):
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._cache_bytes:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                total -= size


class OtherBytes(ValueError):
    """A file that arrived with another hash than the index says."""


def _is_an_answer(error: Exception) -> bool:
    """Whether the store said no, in place of saying nothing: asking longer would not help."""
    if isinstance(error, OtherBytes | FileNotFoundError | PermissionError | IsADirectoryError):
        return True
    status = getattr(error, "status", None)  # of aiohttp's errors
    return type(status) is int and 400 <= status < 500 and status not in (408, 425, 429)


def _open_url(url: str) -> Any:
    fsspec = require("fsspec")
    try:
        return fsspec.open(url, "rb").open()
    except ImportError as error:
        raise DataError(
            f"{url}: {error}",
            allowed="an environment with the package for this kind of URL (s3fs for s3://, gcsfs for gs://)",
            action="install it with pip, then start again",
        ) from error
