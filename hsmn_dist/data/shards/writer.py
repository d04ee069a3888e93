"""Write samples into tar shards of bounded size, each renamed into place only when it is whole and on the disk.

What is unusual: the bytes depend on the samples alone (no clock, no user name, no process count), so preparing again after a
crash gives the same files. A full disk removes the half-written file and says so.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from hsmn_dist.data.shards.index import SAMPLE_DTYPE, ShardEntry
from hsmn_dist.data.shards.tar_layout import (
    BLOCK_BYTES,
    END_OF_ARCHIVE,
    EXAMPLE_SUFFIX,
    TOKENS_SUFFIX,
    checksum,
    member,
    pack_tokens,
)
from hsmn_dist.foundation.errors import DataError
from hsmn_dist.foundation.files import atomic_path

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def disk_error(path: Path, error: OSError) -> DataError:
    """The message for a disk that took no more bytes."""
    return DataError(
        f"{path}: could not be written ({error.strerror or error})",
        allowed="a disk with room for the shards",
        action="free space or choose another folder, then start the same command again; nothing half-written is kept",
    )


@contextmanager
def disk_errors_as_data_errors(path: Path) -> Iterator[None]:
    """Turn what a full or read-only disk raises into a `DataError` about `path`; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_ERRORS:
            raise disk_error(path, error) from error
        raise


class ShardWriter:
    """Context manager that writes `PREFIX-000.tar`, `PREFIX-001.tar`, ... into a folder.

    `close` (or leaving the `with` block without an error) completes the last shard; leaving it by an error removes the
    shard that is being written. Completed shards stay: they are whole, and nothing trusts them before an index does.
    """

    def __init__(self, folder: Path, prefix: str, *, shard_bytes: int, token_dtype: str) -> None:
        self._folder = folder
        self._prefix = prefix
        self._shard_bytes = shard_bytes
        self._token_dtype = token_dtype
        self._stack = ExitStack()
        self._stream: BinaryIO | None = None
        self._name = ""
        self._hash = hashlib.sha256()
        self._offset = 0
        self._rows: list[tuple[int, ...]] = []
        self._first_row = 0
        self.shards: list[ShardEntry] = []

    @property
    def samples(self) -> np.ndarray:
        """The numbers of every sample written so far, [num_samples] of `SAMPLE_DTYPE`."""
        return np.array(self._rows, dtype=SAMPLE_DTYPE)

    def write(self, example: bytes, context: list[int], target: list[int]) -> None:
        """Append one sample: the example's JSON, and its token ids."""
        key = f"{self._prefix}-{len(self._rows):07d}"
        tokens = pack_tokens(context, target, self._token_dtype)
        first = member(f"{key}.{EXAMPLE_SUFFIX}", example)
        second = member(f"{key}.{TOKENS_SUFFIX}", tokens)
        if self._stream is not None and self._offset + len(first) + len(second) > self._shard_bytes - 2 * BLOCK_BYTES:
            self._finish()
        with disk_errors_as_data_errors(self._folder):
            if self._stream is None:
                self._start()
            row = (
                self._offset,
                len(example),
                len(tokens),
                checksum(first),
                checksum(second),
                len(context),
                len(target),
            )
            self._append(first + second)
        self._rows.append(row)

    def close(self) -> None:
        """Complete the shard being written, if any."""
        if self._stream is not None:
            self._finish()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            with suppress(OSError):  # a full disk refuses the buffered rest once more; the file goes away either way
                self._stack.__exit__(kind, error, trace)

    def _start(self) -> None:
        self._name = f"{self._prefix}-{len(self.shards):03d}.tar"
        aside = self._stack.enter_context(atomic_path(self._folder / self._name))
        self._stream = self._stack.enter_context(aside.open("wb"))
        self._hash = hashlib.sha256()
        self._offset = 0
        self._first_row = len(self._rows)

    def _append(self, data: bytes) -> None:
        assert self._stream is not None
        self._stream.write(data)
        self._hash.update(data)
        self._offset += len(data)

    def _finish(self) -> None:
        with disk_errors_as_data_errors(self._folder):
            self._append(END_OF_ARCHIVE)
            self._stream = None
            self._stack.close()  # closes the file, flushes it to the disk, renames it
        rows = self._rows[self._first_row :]
        self.shards.append(
            ShardEntry(
                name=self._name,
                bytes=self._offset,
                sha256=self._hash.hexdigest(),
                num_samples=len(rows),
                num_context_tokens=sum(row[5] for row in rows),
                num_target_tokens=sum(row[6] for row in rows),
            )
        )
        self._stack = ExitStack()
