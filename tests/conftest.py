"""Test-wide settings: the repository root is importable, and no test leaves process-wide state to the next one."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True, scope="module")
def _no_process_group_is_left() -> Iterator[None]:
    """A process group of one rank, which engines form, ends with the file that formed it."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _logging_is_as_it_was() -> Iterator[None]:
    """Commands set up logging for their process; the next test starts from a plain logger."""
    yield
    logger = logging.getLogger("hsmn_dist")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
