"""Durable files: written aside, flushed to the disk, renamed; the manifest comes last.

A folder counts as existing only when its manifest does. A crash can leave temporary names behind (`.name.tmp-*`), which no
reader trusts and the next writer removes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from hsmn_dist.foundation.errors import CheckpointError

_BLOCK_BYTES = 1 << 20


def sha256_of_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    """Hexadecimal SHA-256 of a JSON value; equal values give equal digests whatever their key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary file name beside `path`; on success it is flushed and renamed, on error removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f".{path.name}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        yield aside
        with aside.open("rb") as stream:
            os.fsync(stream.fileno())
        aside.replace(path)
        fsync_folder(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a binary file atomically."""
    with atomic_path(path) as aside:
        aside.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, two-space indented."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; a damaged one is a `CheckpointError` that names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        # No UTF-8, no JSON, a number of thousands of digits, or nested too deeply.
        raise CheckpointError(
            f"{path}: not valid JSON ({error})",
            allowed="a file written whole by this program",
            action="remove the folder that holds it and make it again",
        ) from error


def remove_leftovers(folder: Path) -> None:
    """Delete what a crashed writer left in `folder`: names of the form `.name.tmp-*`."""
    for path in folder.glob(".*.tmp-*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_manifest(folder: Path, manifest_name: str, files: list[str], extra: dict[str, Any]) -> None:
    """Hash `files` of `folder` and write the manifest last; only then does the folder count as complete."""
    entries = {
        name: {"sha256": sha256_of_file(folder / name), "bytes": (folder / name).stat().st_size} for name in files
    }
    for name in files:
        with (folder / name).open("rb") as stream:
            os.fsync(stream.fileno())
    write_json(folder / manifest_name, {"files": entries, **extra})


def _is_manifest(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("files"), dict):
        return False
    return all(
        is_inside(name)
        and isinstance(entry, dict)
        and isinstance(entry.get("sha256"), str)
        and type(entry.get("bytes")) is int
        for name, entry in value["files"].items()
    )


def is_inside(name: Any) -> bool:
    """Whether a file name of a manifest stays inside its folder: relative, without `..`, printable."""
    if not isinstance(name, str) or not name or not name.isprintable() or "\\" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def verify_manifest(folder: Path, manifest_name: str) -> dict[str, Any]:
    """Read the manifest and check the size and hash of each file it names.

    Raises:
        CheckpointError: the manifest is absent, a file is missing, or its bytes changed.
    """
    path = folder / manifest_name
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: no {manifest_name}, so it was never completed",
            allowed=f"a folder whose {manifest_name} was written last",
            action="use an older complete folder, or make this one again",
        )
    manifest: dict[str, Any] = read_json(path)
    if not _is_manifest(manifest):
        raise CheckpointError(
            f"{path}: no manifest of files with a size and a SHA-256 each, all inside the folder",
            allowed="a manifest written whole by this program",
            action="use an older complete folder, or make this one again",
        )
    for name, entry in manifest["files"].items():
        problem = file_problem(folder / name, entry["sha256"], entry["bytes"])
        if problem:
            raise CheckpointError(
                f"{folder / name}: {problem}",
                allowed="the bytes that were written",
                action="use an older complete folder, or make this one again",
            )
    return manifest


def file_problem(file: Path, sha256: str, num_bytes: int) -> str:
    """How a file differs from what its manifest says of it, in words; empty where it does not. The size is looked at first."""
    if not file.is_file():
        return "is missing"
    if file.stat().st_size != num_bytes:
        return f"has {file.stat().st_size} bytes, not {num_bytes}"
    return "" if sha256_of_file(file) == sha256 else "has another SHA-256 than its manifest says"
