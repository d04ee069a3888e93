"""Open a prepared folder and read any sample by its number; every read is checked.

What is unusual: nothing is read in sequence. The index gives the place of a sample, one positioned read brings it, and a CRC-32
over header, payload and padding shows every flipped bit; a short read shows a cut file, the file's size a replaced one. Plain
webdataset passes over three of these in silence. Only JSON and raw integers are decoded: no pickle, no `pipe:`.

`verify_folder` is the thorough form: SHA-256 of every shard, and a walk over its members.
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from json.scanner import make_scanner
from pathlib import Path
from typing import Any

import numpy as np

from hsmn_dist.data.example import Example
from hsmn_dist.data.shards.index import ShardEntry, ShardIndex, load_index, load_samples
from hsmn_dist.data.shards.remote import (
    OWN_CACHE,
    CacheSettings,
    FetchFailed,
    RemoteFiles,
    Retry,
    folder_name,
    is_url,
    own_cache_folder,
    require_known_scheme,
)
from hsmn_dist.data.shards.tar_layout import (
    BLOCK_BYTES,
    COUNT_BYTES,
    TOKENS_SUFFIX,
    checksum,
    example_span,
    member_names,
    tokens_span,
)
from hsmn_dist.foundation.errors import DataError
from hsmn_dist.foundation.files import sha256_of_file

# Open files: enough for the windows of several datasets; fetched shards that left the cache stay on the disk while open.
MAX_OPEN_LOCAL = 512
MAX_OPEN_REMOTE = 32

_scan_json = make_scanner(json.JSONDecoder())  # type: ignore[arg-type]  # the stub asks for a scanner, the code for a decoder
Tokens = tuple[np.ndarray, np.ndarray]


class DamagedSample(DataError):
    """A sample or shard whose bytes are not those that were written. The loader's policy decides what follows."""


def _damaged(where: str, problem: str) -> DamagedSample:
    return DamagedSample(
        f"{where}: {problem}",
        allowed="the bytes that were written",
        action="copy or prepare the shard again, or set data.corrupt_policy to 'quarantine' with a data.quarantine_limit",
    )


class OpenShard:
    """A read descriptor that closes itself with its last user, so a cache may drop it while a thread still reads."""

    def __init__(self, path: Path, entry: ShardEntry) -> None:
        self.descriptor = -1
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise _damaged(str(path), f"cannot be opened ({error.strerror})") from error
        num_bytes = os.fstat(self.descriptor).st_size
        if num_bytes != entry.bytes:
            raise _damaged(str(path), f"has {num_bytes} bytes, not {entry.bytes}")

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class SplitReader:
    """One split of a prepared folder, by sample number. Safe to use from several threads."""

    def __init__(self, folder: Path | str, split: str, remote: RemoteFiles | None = None) -> None:
        self.name = str(folder)
        self.split = split
        self._remote = remote
        if remote is not None:
            remote.fetch_index()
        self.folder = remote.folder if remote is not None else Path(folder)
        self.index: ShardIndex = load_index(self.folder)
        self.entry = self.index.split(split, folder)
        self.samples = load_samples(self.folder / self.entry.samples_file, self.entry)
        self.shard_sizes = np.array([shard.num_samples for shard in self.entry.shards], dtype=np.int64)
        self._ends = np.cumsum(self.shard_sizes)
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._broken: dict[int, DamagedSample] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.samples)

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Context and target token counts of samples, [len(numbers), 2] int64, without reading a shard."""
        rows = self.samples[numbers]
        return np.stack([rows["context_tokens"], rows["target_tokens"]], axis=1).astype(np.int64)

    def read_tokens(self, number: int) -> Tokens:
        """Context and target ids of a sample.

        Raises:
            DamagedSample: the shard is missing, cut, or holds other bytes than were written.
        """
        return self.read_many_tokens([number])[0]

    def read_many_tokens(self, numbers: Sequence[int]) -> list[Tokens]:
        """Context and target ids of several samples, in the order asked for, as read-only arrays.

        Raises:
            DamagedSample: as `read_tokens`, for the first damaged one.
        """
        wanted = np.asarray(numbers, dtype=np.int64)
        rows = self.samples[wanted]
        starts, lengths = tokens_span(rows["offset"].astype(np.int64), rows["example_bytes"], rows["token_bytes"])
        blocks = self._read(wanted, starts, lengths, rows["token_crc"])
        dtype = np.dtype(self.index.token_dtype)
        num_ids = rows["context_tokens"].astype(np.int64) + rows["target_tokens"]
        wrong = np.flatnonzero(rows["token_bytes"] != COUNT_BYTES + num_ids * dtype.itemsize)
        if len(wrong):
            raise _damaged(self._where(int(wanted[wrong[0]])), "its token counts differ from the index")
        found: list[Tokens] = []
        # The checksum vouches for the stored count of context ids, which is the index's.
        for block, total, num_context in zip(blocks, num_ids.tolist(), rows["context_tokens"].tolist(), strict=True):
            ids = np.frombuffer(block, dtype, total, BLOCK_BYTES + COUNT_BYTES)
            found.append((ids[:num_context], ids[num_context:]))
        return found

    def read_json(self, number: int) -> dict[str, Any]:
        """The decoded example of a sample, as stored.

        Raises:
            DamagedSample: as `read_tokens`, or the bytes are not JSON.
        """
        return self.read_many_json([number])[0]

    def read_many_json(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """The decoded examples of several samples, in the order asked for.

        Raises:
            DamagedSample: as `read_json`, for the first damaged one.
        """
        wanted = np.asarray(numbers, dtype=np.int64)
        rows = self.samples[wanted]
        starts, lengths = example_span(rows["offset"].astype(np.int64), rows["example_bytes"])
        blocks = self._read(wanted, starts, lengths, rows["example_crc"])
        found: list[dict[str, Any]] = []
        for number, block, num_bytes in zip(numbers, blocks, rows["example_bytes"].tolist(), strict=True):
            try:
                text = block[BLOCK_BYTES : BLOCK_BYTES + num_bytes].decode("utf-8")
                value, end = _scan_json(text, 0)  # json.loads would look for the encoding and for blanks first
                if end != len(text):
                    raise ValueError(f"more than one value, at character {end}")
                found.append(value)
            except (ValueError, StopIteration, RecursionError) as error:
                raise _damaged(self._where(number), f"its JSON cannot be decoded ({error})") from error
        return found

    def read_example(self, number: int) -> Example:
        """The example of a sample, text and meta.

        Raises:
            DamagedSample: as `read_json`, or the JSON is no example.
        """
        value = self.read_json(number)
        try:
            return Example(**value)
        except (TypeError, KeyError, DataError) as error:
            raise _damaged(self._where(number), f"is no example ({type(error).__name__}: {error})") from error

    def close(self) -> None:
        """Close the shards that are open."""
        with self._lock:
            self._open.clear()

    def _where(self, number: int) -> str:
        shard = int(np.searchsorted(self._ends, number, side="right"))
        in_shard = number - int(self._ends[shard]) + self.entry.shards[shard].num_samples
        return f"{self.name}/{self.entry.shards[shard].name}: sample {in_shard} of the shard ({number} of {self.split})"

    def _read(self, numbers: np.ndarray, starts: np.ndarray, lengths: np.ndarray, crcs: np.ndarray) -> list[bytes]:
        """The checked bytes of spans, one positioned read each."""
        shards = np.searchsorted(self._ends, numbers, side="right")
        blocks: list[bytes] = []
        opened, read = self._open, os.pread
        spans = zip(shards.tolist(), starts.tolist(), lengths.tolist(), crcs.tolist(), strict=True)
        for shard, start, length, crc in spans:
            file = opened.get(shard) or self._open_shard(shard)
            if not 0 <= start <= start + length <= self.entry.shards[shard].bytes:
                problem = f"lies at {start} to {start + length} of {self.entry.shards[shard].bytes} bytes"
                raise _damaged(self._where(int(numbers[len(blocks)])), problem)
            try:
                data = read(file.descriptor, length, start)
            except OSError as error:
                number = int(numbers[len(blocks)])
                raise _damaged(self._where(number), f"cannot be read ({error.strerror})") from error
            if checksum(data) != crc:
                problem = f"ends after {len(data)} of {length} bytes" if len(data) < length else "its checksum differs"
                raise _damaged(self._where(int(numbers[len(blocks)])), problem)
            blocks.append(data)
        return blocks

    def _open_shard(self, shard: int) -> OpenShard:
        if shard in self._broken:  # a shard that cannot be had is not fetched again for each of its samples
            raise self._broken[shard]
        entry = self.entry.shards[shard]
        try:
            opened = OpenShard(self.folder / entry.name if self._remote is None else self._remote.path(entry), entry)
        except FetchFailed as error:
            self._broken[shard] = DamagedSample(error.found, allowed=error.allowed, action=error.action)
            raise self._broken[shard] from error
        except DamagedSample as error:
            self._broken[shard] = error
            raise
        with self._lock:
            # Oldest first: a stream goes from window to window, so these are the ones it is done with.
            self._open[shard] = opened
            while len(self._open) > (MAX_OPEN_LOCAL if self._remote is None else MAX_OPEN_REMOTE):
                self._open.popitem(last=False)
        return opened


def open_folder(folder: Path | str, split: str, cache: CacheSettings = OWN_CACHE) -> SplitReader:
    """A reader of a local folder or of a URL; the cache is used for URLs alone.

    Raises:
        DataError: no such folder or split, a damaged index, a URL of an unknown kind or an index that is not there.
        StoreAway: the store does not answer.
    """
    return SplitReader(folder, split, remote_files(folder, cache) if is_url(folder) else None)


def read_index(folder: Path | str, cache: CacheSettings = OWN_CACHE) -> ShardIndex:
    """The index of a local folder or of a URL, as `open_folder` finds them.

    Raises:
        DataError: no such folder, a damaged index, a URL of an unknown kind or an index that is not there.
        StoreAway: the store does not answer.
    """
    return remote_files(folder, cache).fetch_index() if is_url(folder) else load_index(Path(folder))


def remote_files(folder: Path | str, cache: CacheSettings = OWN_CACHE) -> RemoteFiles:
    """The files of a folder at a URL, through the machine's cache."""
    require_known_scheme(folder_name(folder))
    place = Path(cache.cache_folder) if cache.cache_folder else own_cache_folder()
    return RemoteFiles(folder_name(folder), place, cache.cache_bytes, Retry(cache.fetch_attempts))


def read_examples(
    folder: Path | str, split: str, limit: int | None = None, cache: CacheSettings = OWN_CACHE
) -> Iterator[Example]:
    """The examples of a split in the order of the shards, at most `limit` of them (None or 0: all)."""
    reader = open_folder(folder, split, cache)
    try:
        for number in range(min(len(reader), limit) if limit else len(reader)):
            yield reader.read_example(number)
    finally:
        reader.close()


def shard_problems(folder: Path, entry: ShardEntry) -> list[str]:
    """Everything that is wrong with one shard: absence, size, hash, members that do not belong, count."""
    path = folder / entry.name
    if not path.is_file():
        return [f"{path}: is missing"]
    problems = []
    if path.stat().st_size != entry.bytes:
        problems.append(f"{path}: has {path.stat().st_size} bytes, not {entry.bytes}")
    elif sha256_of_file(path) != entry.sha256:
        problems.append(f"{path}: has another SHA-256 than the index says")
    try:
        names = list(member_names(path))
    except (ValueError, OSError) as error:
        return [*problems, f"{path}: {error}"]
    num_samples = sum(name.endswith(f".{TOKENS_SUFFIX}") for name in names)
    if num_samples != entry.num_samples:
        problems.append(f"{path}: holds {num_samples} samples, the index says {entry.num_samples}")
    return problems


def folder_problems(folder: Path) -> list[str]:
    """Everything that is wrong with a prepared folder; empty when every byte is the one that was written."""
    try:
        index = load_index(folder)
    except DataError as error:
        return [error.found]
    problems: list[str] = []
    for split in index.splits.values():
        try:
            load_samples(folder / split.samples_file, split)
        except DataError as error:
            problems.append(error.found)
        for entry in split.shards:
            problems.extend(shard_problems(folder, entry))
    return problems


def verify_folder(folder: Path) -> ShardIndex:
    """Check every byte of a prepared folder.

    Raises:
        DataError: the first problem, and how many there are.
    """
    problems = folder_problems(folder)
    if problems:
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise DataError(
            problems[0] + more,
            allowed="the bytes that were written, with their index",
            action="prepare the dataset again, or copy the folder again",
        )
    return load_index(folder)
