"""Golden files of the preprocessors, for the tests that read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).resolve().parents[1] / "unit" / "data" / "preprocessors" / "golden"


def golden_names() -> list[str]:
    """Every dataset that has a golden file, sorted."""
    return sorted(path.stem for path in GOLDEN.glob("*.json"))


def golden(name: str) -> dict[str, Any]:
    """The golden file of a dataset: `own` rows with whole examples, and `real` expectations where real rows exist."""
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
