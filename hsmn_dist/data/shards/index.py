"""ShardIndex: what a prepared folder holds, shard by shard and sample by sample; `index.json` is written last.

What is unusual: the numbers of single samples (offset, sizes, checksums, token counts) lie in one `.npy` file per split, whose
SHA-256 stands in `index.json`. A million samples are 32 MB, mapped into memory, so opening a folder costs one hash and no
parsing.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hsmn_dist.foundation.errors import DataError, HsmnError
from hsmn_dist.foundation.files import atomic_path, read_json, sha256_of_file, sha256_of_json, write_json

INDEX_NAME = "index.json"
FORMAT = 1
SPLITS = ("train", "validation", "test")
SAMPLE_DTYPE = np.dtype(
    [
        ("offset", "<u8"),
        ("example_bytes", "<u4"),
        ("token_bytes", "<u4"),
        ("example_crc", "<u4"),
        ("token_crc", "<u4"),
        ("context_tokens", "<u4"),
        ("target_tokens", "<u4"),
    ]
)
LARGEST_COUNT = 1 << 56
TOKEN_DTYPES = ("<u2", "<u4")
_SHARD_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.-]*\.tar$")
_SAMPLES_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.-]*\.npy$")


@dataclass(frozen=True)
class ShardEntry:
    """One tar file: its name in the folder, its size, its hash, and how many samples it holds."""

    name: str
    bytes: int
    sha256: str
    num_samples: int
    num_context_tokens: int
    num_target_tokens: int

    def __post_init__(self) -> None:
        # A shard is a plain file of the folder: no `pipe:`, no other folder (the rule of WDS_SECURE).
        if not (isinstance(self.name, str) and _SHARD_NAME.fullmatch(self.name)):
            raise DataError(
                f"an index names the shard {self.name!r}",
                allowed="a .tar file of letters, digits, '_', '.' and '-' in the index's own folder",
                action="do not trust this folder; prepare it again",
            )


@dataclass(frozen=True)
class SplitEntry:
    """One split: its shards in order and the file with the numbers of its samples."""

    shards: tuple[ShardEntry, ...]
    samples_file: str
    samples_sha256: str

    @property
    def num_samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_target_tokens(self) -> int:
        """Target tokens of all shards, <eos> included."""
        return sum(shard.num_target_tokens for shard in self.shards)

    @property
    def num_context_tokens(self) -> int:
        """Context tokens of all shards."""
        return sum(shard.num_context_tokens for shard in self.shards)


@dataclass(frozen=True)
class ShardIndex:
    """A whole prepared dataset.

    Attributes:
        dataset: name of the dataset.
        config_digest: SHA-256 of the settings that decide the bytes; equal digests mean equal shards.
        tokenizer_digest: digest of the tokenizer that made the tokens.
        token_dtype: "<u2" or "<u4".
        splits: by name.
        skipped: `SkipCounter.to_json()`: rows that could not be used, by reason.
        truncated: {"contexts": n, "targets": n}: examples that lost tokens to the limits.
        origin: where the rows came from: {"kind", "source", "revision"}.
        notes: further findings, such as duplicates removed and overlap with benchmarks.
    """

    dataset: str
    config_digest: str
    tokenizer_digest: str
    token_dtype: str
    splits: dict[str, SplitEntry]
    skipped: dict[str, Any] = field(default_factory=dict)
    truncated: dict[str, int] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of the index itself, thus of every byte it vouches for."""
        return sha256_of_json(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The content of `index.json`."""
        return {"format": FORMAT, **asdict(self)}

    def split(self, name: str, folder: object) -> SplitEntry:
        """The entry of a split.

        Raises:
            DataError: there is no such split.
        """
        if name not in self.splits:
            raise DataError(
                f"{folder}: no split {name!r}",
                allowed=", ".join(map(repr, self.splits)),
                action="choose one of them, or prepare the dataset again",
            )
        return self.splits[name]


def save_index(folder: Path, index: ShardIndex) -> None:
    """Write `index.json`; from then on the folder counts as complete."""
    write_json(folder / INDEX_NAME, index.to_json())


def load_index(folder: Path) -> ShardIndex:
    """Read `index.json`.

    Raises:
        DataError: it is absent (the folder was never completed), damaged, or of another format.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        raise DataError(
            f"{folder}: no {INDEX_NAME}" + ("" if folder.is_dir() else ", and no such folder"),
            allowed="a prepared folder, whose index is written last",
            action="run `hsmn-dist prepare` again; it goes on where it was stopped",
        )
    try:
        return parse_index(read_json(path), path)
    except DataError:
        raise
    except HsmnError as error:
        raise DataError(error.found, allowed=error.allowed, action=error.action) from error


def parse_index(value: Any, path: object) -> ShardIndex:
    """A `ShardIndex` from the JSON value of `path`."""
    try:
        if value["format"] != FORMAT:
            raise DataError(
                f"{path}: format {value['format']!r}",
                allowed=f"format {FORMAT}",
                action="prepare the dataset again with this version",
            )
        splits = {
            name: SplitEntry(
                shards=tuple(ShardEntry(**shard) for shard in split["shards"]),
                samples_file=split["samples_file"],
                samples_sha256=split["samples_sha256"],
            )
            for name, split in value["splits"].items()
        }
        for split in splits.values():
            if not _SAMPLES_NAME.fullmatch(split.samples_file):
                raise KeyError(split.samples_file)
        rest = {key: value[key] for key in ShardIndex.__dataclass_fields__ if key != "splits"}
        index = ShardIndex(splits=splits, **rest)
        _check_values(index)
        return index
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not an index of shards ({type(error).__name__}: {error})",
            allowed="an index.json written whole by `hsmn-dist prepare`",
            action="remove the folder and prepare it again",
        ) from error


def _check_values(index: ShardIndex) -> None:
    """Types and ranges: what comes from elsewhere must not surprise the arithmetic behind it."""
    texts = [index.dataset, index.config_digest, index.tokenizer_digest]
    counts: list[Any] = []
    for split in index.splits.values():
        texts.append(split.samples_sha256)
        for shard in split.shards:
            texts.append(shard.sha256)
            counts += [shard.bytes, shard.num_samples, shard.num_context_tokens, shard.num_target_tokens]
    if not index.splits:
        raise ValueError("no splits")
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("a name or digest that is no text")
    if not all(type(count) is int and 0 <= count < LARGEST_COUNT for count in counts):
        raise ValueError("a size or count that is no whole number from 0")
    if index.token_dtype not in TOKEN_DTYPES:
        raise ValueError(f"token_dtype {index.token_dtype!r}")
    if not all(isinstance(value, dict) for value in (index.skipped, index.truncated, index.origin, index.notes)):
        raise TypeError("a record that is no mapping")


def save_samples(path: Path, samples: np.ndarray) -> str:
    """Write the numbers of a split's samples; gives the file's SHA-256."""
    with atomic_path(path) as aside, aside.open("wb") as stream:
        np.save(stream, samples.astype(SAMPLE_DTYPE), allow_pickle=False)
    return sha256_of_file(path)


def load_samples(path: Path, split: SplitEntry) -> np.ndarray:
    """The numbers of a split's samples ([num_samples] of `SAMPLE_DTYPE`), mapped, after the hash agreed.

    Raises:
        DataError: the file is missing, its hash differs, or its count contradicts the shards'.
    """
    if not path.is_file():
        problem = "is missing"
    elif sha256_of_file(path) != split.samples_sha256:
        problem = "has another SHA-256 than index.json says"
    else:
        try:
            samples: np.ndarray = np.lib.format.open_memmap(path, mode="r")
        except Exception as error:  # the header is parsed as text, and fails in a dozen ways
            problem = f"is no array of samples ({type(error).__name__}: {error})"
        else:
            if samples.dtype == SAMPLE_DTYPE and samples.ndim == 1 and len(samples) == split.num_samples:
                return samples
            counted = f"{len(samples)} samples" if samples.dtype == SAMPLE_DTYPE and samples.ndim == 1 else "no samples"
            problem = f"counts {counted}, the shards of index.json {split.num_samples}"
    raise DataError(
        f"{path}: {problem}",
        allowed="the file that was written together with index.json",
        action="remove the folder and prepare it again",
    )
