"""FLOPs and kept bytes of HOPE's parts that have no formula, read off the part's own code on tensors without storage.

Unusual: nothing is computed and nothing estimated. The part (a mixer or a continuum memory) is built and run once under torch's
fake tensors; torch's FLOP counter sees every product and a saved-tensors hook every storage that autograd keeps. Memories work
through a row in steps of equal cost, so rows of many steps are extended from two short ones (exact: tests compare with a long row).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from hsmn_dist.config.models import HopeConfig, HsmnHopeConfig
from hsmn_dist.models.hope.build_parts import build_block, build_cms
from hsmn_dist.models.hope.mixers import SequenceInfo
from hsmn_dist.models.layers.rotary import rotary_table


@dataclass(frozen=True)
class PartCost:
    """Of one row's forward pass.

    Attributes:
        flops: as torch's counter has them.
        kept: bytes for the backward pass, the part's input and parameters left out.
    """

    flops: float
    kept: float


def mixer_cost(config: HopeConfig, tokens: int, element: int, is_gpu: bool = True) -> PartCost:
    """Cost of a block's mixer on a row of `tokens`, at `element` bytes a weight."""
    config = config if is_gpu else _unbounded(config)
    settings = config.self_modifying
    step = config.chunk_tokens if config.mixer == "linear" else max(settings.chunk_tokens, settings.memory_chunk_tokens)
    return _cost(config, None, tokens, element, step)


def chain_cost(
    config: HopeConfig | HsmnHopeConfig, index: int, tokens: int, element: int, is_gpu: bool = True
) -> PartCost:
    """Cost of the chain-form memory of block `index`."""
    config = config if is_gpu else _unbounded(config)
    if config.cms.spread == "every_block":
        index = 0
    return _cost(config, index, tokens, element, max([1, *(level.period for level in config.cms.levels)]))


def _unbounded(config: Any) -> Any:
    """Without bounds on growth: on a CPU a memory looks whether it is below them, as nearly always, and keeps nothing for them."""
    free = {"largest_growth": 0.0}
    changes = {"cms": config.cms.model_copy(update=free)}
    if isinstance(config, HopeConfig):
        changes["self_modifying"] = config.self_modifying.model_copy(update=free)
    return config.model_copy(update=changes)


def _cost(config: Any, cms_index: int | None, tokens: int, element: int, step: int) -> PartCost:
    """Traced whole, or extended from rows of three steps and of four, with the same last piece."""
    num_steps = 3
    if tokens < (num_steps + 2) * step:
        return _traced(config, cms_index, tokens, element)
    rest = tokens % step
    few, more = (_traced(config, cms_index, count * step + rest, element) for count in (num_steps, num_steps + 1))
    further = tokens // step - num_steps - 1
    return PartCost(more.flops + further * (more.flops - few.flops), more.kept + further * (more.kept - few.kept))


@lru_cache(maxsize=256)
def _traced(config: Any, cms_index: int | None, tokens: int, element: int) -> PartCost:
    dtype = torch.bfloat16 if element == 2 else torch.float32
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        part = _built(config, cms_index, dtype)
        x = torch.empty(1, tokens, config.d_model, dtype=dtype, requires_grad=True)
        info = SequenceInfo()
        if cms_index is None and config.positions == "rotary":
            info.rotary = rotary_table(torch.arange(tokens), config.d_model // config.num_heads, config.rotary_base)
        # Fake tensors have no addresses; their storages are objects, held here so that none is counted twice.
        outside = {_identity(tensor) for tensor in [x, *part.parameters()]}
        kept: dict[int, Any] = {}

        def pack(tensor: Tensor) -> Tensor:
            if _identity(tensor) not in outside:
                kept[_identity(tensor)] = tensor.untyped_storage()
            return tensor

        keeping = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with keeping, FlopCounterMode(display=False) as counter:
            part(x, None, info)
        return PartCost(float(counter.get_total_flops()), float(sum(storage.nbytes() for storage in kept.values())))


def _built(config: Any, cms_index: int | None, dtype: torch.dtype) -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # fake parameters cannot be converted once they are there
    try:
        return build_block(config, 0).mixer if cms_index is None else build_cms(config, cms_index)
    finally:
        torch.set_default_dtype(before)


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
