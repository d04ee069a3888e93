"""Preparation spread over Ray gives the same bytes as preparation in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.whole_job import run_command


@pytest.mark.ray
def test_ray_tasks_write_the_same_bytes_as_one_process(tmp_path: Path) -> None:
    for name, words in {"alone": [], "ray": ["--ray"]}.items():
        done = run_command(
            "prepare", "--dataset", "word_problems", "--num-examples", "200", "--out", name, *words, folder=tmp_path
        )
        assert done.status == 0, done.errors
    files = sorted(path.name for path in (tmp_path / "alone").iterdir() if path.is_file() and path.name[0] != ".")
    assert any(name.endswith(".tar") for name in files)
    for name in files:
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "ray" / name).read_bytes(), name
