"""How many parameters a model has, read off the model itself: built on the meta device, where tensors have shapes and no memory.

The counts equal the built model's by construction; no formula can drift from the code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hsmn_dist.config.models import ModelConfig
from hsmn_dist.foundation.param_role import ParamRole
from hsmn_dist.models.build import construct_model


@dataclass(frozen=True)
class ParameterCount:
    """Sizes of a model's parameters.

    Attributes:
        sizes: elements of each parameter, in the model's order (a tied table once).
        by_component: elements of each component.
        num_blocks: blocks that activation checkpointing may wrap.
        largest_block: elements of the largest of them.
        matrices: shapes of the hidden matrices, which a matrix rule (Muon, M3, deep momentum) updates whole.
        periodic: elements that are updated every several steps only (`LanguageModel.parameter_updates`).
    """

    sizes: tuple[int, ...]
    by_component: dict[str, int]
    num_blocks: int
    largest_block: int
    matrices: tuple[tuple[int, int], ...] = ()
    periodic: int = 0

    @property
    def total(self) -> int:
        """Elements of all parameters."""
        return sum(self.sizes)

    def at_most(self, elements: int) -> int:
        """Elements in parameters that have no more than `elements` each."""
        return sum(size for size in self.sizes if size <= elements)

    def padded(self, world_size: int) -> int:
        """Elements when each parameter is cut into `world_size` equal pieces (ZeRO stage 3)."""
        return sum(-(-size // world_size) * world_size for size in self.sizes)


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count the parameters of the model that `config` describes, without its memory."""
    with torch.device("meta"):
        model = construct_model(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    by_component: dict[str, int] = {}
    for name, component in model.parameter_components().items():
        by_component[component] = by_component.get(component, 0) + sizes[name]
    blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in model.blocks]
    roles = model.parameter_roles()
    shapes = [tuple(p.shape) for name, p in model.named_parameters() if roles[name] is ParamRole.MATRIX]
    return ParameterCount(
        tuple(sizes.values()),
        by_component,
        len(blocks),
        max(blocks, default=0),
        tuple((shape[0], shape[1]) for shape in shapes if len(shape) == 2),
        sum(sizes[name] for name, update in model.parameter_updates().items() if update.period_steps > 1),
    )
