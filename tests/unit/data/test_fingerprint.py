"""Remembered hashes: right after every change of the file, and without reading it again while it is untouched."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from hsmn_dist.data import fingerprint
from hsmn_dist.data.executor import InlineExecutor, ProcessExecutor, build_executor
from hsmn_dist.data.fingerprint import Fingerprints
from hsmn_dist.foundation.errors import DataError


def test_an_untouched_file_is_read_once_and_a_changed_one_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"one")
    read: list[Path] = []
    real = fingerprint.sha256_of_file
    monkeypatch.setattr(fingerprint, "sha256_of_file", lambda p: read.append(p) or real(p))
    first = Fingerprints(tmp_path / "store.json")
    assert first.sha256(path) == first.sha256(path) == hashlib.sha256(b"one").hexdigest()
    first.save()
    again = Fingerprints(tmp_path / "store.json")
    assert again.sha256(path) == hashlib.sha256(b"one").hexdigest() and len(read) == 1
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    assert again.sha256(path) == hashlib.sha256(b"two").hexdigest() and len(read) == 2


def test_a_damaged_store_only_costs_the_hashes(tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text("{")
    (tmp_path / "a").write_bytes(b"a")
    assert Fingerprints(tmp_path / "store.json").sha256(tmp_path / "a") == hashlib.sha256(b"a").hexdigest()


def double(value: int) -> int:
    if value == 13:
        raise DataError("thirteen", allowed="other numbers", action="choose one")
    return 2 * value


def test_processes_give_every_result_and_pass_an_error_on() -> None:
    executor = ProcessExecutor(2)
    assert sorted(executor.map(double, range(6))) == [0, 2, 4, 6, 8, 10]
    with pytest.raises(DataError) as caught:
        list(executor.map(double, [1, 13, 2]))
    assert caught.value.allowed == "other numbers"


def test_one_task_or_one_process_needs_no_pool() -> None:
    assert isinstance(build_executor(8, 1), InlineExecutor) and isinstance(build_executor(1, 8), InlineExecutor)
    assert isinstance(build_executor(8, 3), ProcessExecutor)
