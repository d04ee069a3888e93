"""SHA-256 of large files, remembered while size, time and inode stay the same.

A run names its data by content. Hashing hundreds of gigabytes at every start would take minutes, so the hash of a file that
has not been touched is taken from a small JSON file. Flipped bits that leave the time alone are for the reader's checksums.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hsmn_dist.foundation.errors import CheckpointError
from hsmn_dist.foundation.files import read_json, sha256_of_file, write_json


class Fingerprints:
    """Hashes by path, kept in `store` (a JSON file)."""

    def __init__(self, store: Path) -> None:
        self._store = store
        try:
            self._known: dict[str, Any] = read_json(store) if store.is_file() else {}
        except CheckpointError:
            self._known = {}  # only a memory: what it lost is computed again
        self._is_changed = False

    def sha256(self, path: Path) -> str:
        """The hash of a file's content."""
        status = path.stat()
        key = str(path.resolve())
        stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
        known = self._known.get(key)
        if known and known["stamp"] == stamp:
            return str(known["sha256"])
        digest = sha256_of_file(path)
        self._known[key] = {"stamp": stamp, "sha256": digest}
        self._is_changed = True
        return digest

    def save(self) -> None:
        """Write what was learned."""
        if self._is_changed:
            write_json(self._store, self._known)
            self._is_changed = False
