"""Seeds, and the state of every random generator as JSON.

Unusual: the captured state is plain JSON (no pickle), so a checkpoint that holds it can be read without running code. Seeds are
set nowhere else in the library.
"""

from __future__ import annotations

import base64
import hashlib
import random
from typing import Any

import numpy as np
import torch

_SEED_BITS = 63


def derived_seed(seed: int, *parts: int | str) -> int:
    """A seed that depends on every part and on nothing else (SHA-256, so that neighbours are unrelated)."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> (64 - _SEED_BITS)


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed the generators of Python, numpy and torch (all devices).

    Models are built after `seed_everything(seed)`, with the same seed on all ranks; dropout and sampling after
    `seed_everything(seed, rank)`, so that ranks draw different numbers.
    """
    mixed = seed if rank == 0 else derived_seed(seed, "rank", rank)
    random.seed(mixed)
    np.random.seed(mixed % 2**32)
    torch.manual_seed(mixed)


def capture_rng() -> dict[str, Any]:
    """State of every generator of this process, JSON-able."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, _encode(np.asarray(keys, dtype="<u4").tobytes()), position, has_gauss, cached],
        "torch": _encode(torch.get_rng_state().numpy().tobytes()),
        "cuda": [_encode(state.numpy().tobytes()) for state in _cuda_states()],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Set every generator to what `capture_rng` saw. Device states are set where the devices exist."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.frombuffer(base64.b64decode(keys), dtype="<u4"), position, has_gauss, cached))
    torch.set_rng_state(_decode(state["torch"]))
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_decode(text) for text in state["cuda"]])


def _cuda_states() -> list[torch.Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
