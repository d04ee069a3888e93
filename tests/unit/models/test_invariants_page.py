"""docs/invariants.md names tests that exist, and all of the defects and invariants that are numbered."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "invariants.md").read_text(encoding="utf-8")
NODE = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
ROWS = [
    line
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith(("| ---", "| invariant", "| defect", "| input"))
]


def functions_of(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("path", sorted({path for path, _ in NODE.findall(PAGE)}))
def test_every_named_test_exists(path: str) -> None:
    named = {name for file, name in NODE.findall(PAGE) if file == path}
    assert named <= functions_of(ROOT / path), named - functions_of(ROOT / path)
    assert all(name.startswith("test_") for name in named)


def test_every_row_names_one_test() -> None:
    assert ROWS and [row for row in ROWS if len(NODE.findall(row)) != 1] == []


def section(title: str) -> str:
    return PAGE.split(f"## {title}", 1)[1].split("\n## ", 1)[0]


@pytest.mark.parametrize(
    ("title", "count"), [("HSMN: defects of the original", 25), ("HOPE: the 22 invariants of the specification", 22)]
)
def test_all_numbered_points_are_there(title: str, count: int) -> None:
    assert {int(number) for number in re.findall(r"^\| (\d+)", section(title), re.M)} == set(range(1, count + 1))
