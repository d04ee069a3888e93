"""Real dataset rows that lie beside the repository on some machines; tests that want them skip where they are absent."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[3] / "shared"


def shared_data(name: str) -> Path:
    """`rows.jsonl` (or the folder's only rows) of a dataset, or a skip that says why."""
    folder = SHARED / "data" / name
    if not folder.is_dir():
        pytest.skip(f"the real rows of {name} are not on this machine")
    return folder


def shared_file(*parts: str) -> Path:
    """A file of the folder beside the repository, or a skip that says why."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{'/'.join(parts)} is not on this machine")
    return path
