"""Ad-hoc level stacking: start the levels of a CMS from the MLPs of a plain pretrained model.

With writes of rate 0 (or before the first tick) the result computes exactly what the pretrained model computes: level 1 of
each block is the MLP, further levels of a sequential chain start with a zero outer map. Source: arXiv 2512.24695,
section 7.3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.models.hope.chain_memory import ChainMemory
from hsmn_dist.models.hope.optimizer_chain import OptimizerChain
from hsmn_dist.models.layers.feed_forward import FeedForward


@torch.no_grad()
def start_from_mlp(memory: ChainMemory | OptimizerChain, mlp: FeedForward) -> None:
    """Write the MLP (gelu, D -> F -> D, with biases) into level 1 of a sequential or nested chain.

    Raises:
        ModelError: an independent chain, or maps of another size.
    """
    if memory.settings.variant == "independent":
        raise ModelError(
            "stacking onto an independent chain",
            allowed="variant sequential or nested: a weighted sum of levels is not the pretrained MLP",
            action="set `model.cms.variant` to sequential",
        )
    levels = [_tensors(memory, index) for index in range(len(memory.settings.levels))]
    given = (mlp.inner.weight, mlp.inner.bias, mlp.outer.weight, mlp.outer.bias)
    if any(a.shape != b.shape for a, b in zip(levels[0], given, strict=True)):
        raise ModelError(
            f"an MLP of {tuple(mlp.inner.weight.shape)} for a level of {tuple(levels[0][0].shape)}",
            allowed="the same width and hidden units",
            action="set `model.cms.levels[0].hidden_units` to the MLP's inner width",
        )
    for target, source in zip(levels[0], given, strict=True):
        target.copy_(source)
    for _, _, outer, outer_bias in levels[1:]:
        outer.zero_()
        outer_bias.zero_()


def _tensors(memory: nn.Module, index: int) -> tuple[Tensor, ...]:
    if isinstance(memory, ChainMemory):
        return memory.start(index)
    assert isinstance(memory, OptimizerChain)
    level = memory.levels[index]
    assert isinstance(level, FeedForward)
    return level.inner.weight, level.inner.bias, level.outer.weight, level.outer.bias
