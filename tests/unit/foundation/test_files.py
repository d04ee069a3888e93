"""Durable files: nothing half-written is ever visible, and changed bytes are noticed."""

from __future__ import annotations

from pathlib import Path

import pytest

from hsmn_dist.foundation.errors import CheckpointError
from hsmn_dist.foundation.files import (
    atomic_path,
    read_json,
    remove_leftovers,
    verify_manifest,
    write_json,
    write_manifest,
    write_text,
)


def test_a_failed_write_leaves_the_old_file_and_no_leftovers(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(OSError, match="disk"), atomic_path(path) as aside:
        aside.write_text("ne")
        raise OSError("disk full")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_json_round_trip_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, "\u00e9"]})
    assert read_json(path) == {"a": [1, "\u00e9"]}
    path.write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_json(path)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no manifest"])
def test_a_manifest_notices_every_damage(tmp_path: Path, damage: str) -> None:
    data = tmp_path / "data.bin"
    data.write_bytes(b"0123456789")
    write_manifest(tmp_path, "COMPLETE", ["data.bin"], {"step": 3})
    assert verify_manifest(tmp_path, "COMPLETE")["step"] == 3
    if damage == "flip":
        data.write_bytes(b"0123456780")
    elif damage == "truncate":
        data.write_bytes(b"012345678")
    elif damage == "remove":
        data.unlink()
    else:
        (tmp_path / "COMPLETE").unlink()
    with pytest.raises(CheckpointError) as caught:
        verify_manifest(tmp_path, "COMPLETE")
    assert str(tmp_path) in caught.value.found


def test_leftovers_of_a_crash_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".a.txt.tmp-1234").write_text("half")
    (tmp_path / ".step.tmp-5678").mkdir()
    (tmp_path / "kept.txt").write_text("whole")
    remove_leftovers(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["kept.txt"]
