"""Test-wide settings: the repository root is importable, and no test leaves its logging set-up or DeepSpeed's functions to the next one."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def _logging_is_as_it_was() -> Iterator[None]:
    """Commands set up logging for their process; the next test starts from a plain logger."""
    yield
    logger = logging.getLogger("hsmn_dist")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def _linear_is_torchs() -> Iterator[None]:
    """DeepSpeed's ZeRO-3 replaces it while an engine is open, and not every test closes the one that it has."""
    yield
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.nn.functional.linear = torch._C._nn.linear
