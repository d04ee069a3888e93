"""100,000 tokens of one stream through every memory that writes: nothing grows without bound, nothing becomes NaN.

Segments of 2,000 tokens with a carried state, the longest run without a reset that users of streams will do. Random tokens, and
one token repeated, which drives every write in the same direction. (The decay form has its own: test_hope_decayed_reads.py.)
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hsmn_dist.config.models import CmsConfig, SelfModifyingConfig
from hsmn_dist.models.hope.chain_memory import ChainMemory
from hsmn_dist.models.hope.mixers import LinearMixer, SequenceInfo
from hsmn_dist.models.hope.self_modifying import SelfModifyingTitans
from tests.support.hope_models import chain

WIDTH, NUM_TOKENS, SEGMENT = 16, 100_000, 2_000


def titans(**changes: Any) -> nn.Module:
    return SelfModifyingTitans(WIDTH, 2, SelfModifyingConfig(hidden_units=8, initial_rate=0.1, **changes))


def chain_of(**changes: Any) -> nn.Module:
    return ChainMemory(WIDTH, CmsConfig.model_validate(chain((32, 256), **changes)))


MEMORIES = {
    "self_modifying": titans,
    "self_modifying_momentum": lambda: titans(momentum=0.9, objective="half_l2"),
    "self_modifying_matrix": lambda: titans(memory="matrix"),
    "chain": chain_of,
    "chain_nested": lambda: chain_of(variant="nested"),
    "linear": lambda: LinearMixer(WIDTH, 2, 64),
}


def segments(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if kind == "one token":
        return torch.randn(1, 1, WIDTH, generator=generator).repeat(1, NUM_TOKENS, 1)
    return torch.randn(1, NUM_TOKENS, WIDTH, generator=generator)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "one token"])
@pytest.mark.parametrize("name", MEMORIES)
def test_a_stream_of_100_000_tokens_stays_finite_and_bounded(name: str, kind: str) -> None:
    torch.manual_seed(0)
    layer, state, early, late = MEMORIES[name](), None, 0.0, 0.0
    with torch.no_grad():
        for index, part in enumerate(segments(kind).split(SEGMENT, 1)):
            y, state, _ = layer(part, state, SequenceInfo(returns_state=True))
            assert bool(torch.isfinite(y).all()), f"token {index * SEGMENT}"
            largest = float(y.abs().max())
            early, late = (max(early, largest), late) if index < 5 else (early, max(late, largest))
    assert all(bool(torch.isfinite(t).all()) for t in state.tensors() if t.is_floating_point())
    # What the first 10,000 tokens reach is about what the other 90,000 reach: there is no drift.
    assert late <= 3.0 * early + 1e-6, (early, late)
