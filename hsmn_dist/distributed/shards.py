"""ParamShard: one rank's flat piece of one parameter; and who owns which flat elements.

This is everything that Fisher, EWC and resharding know about ZeRO.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hsmn_dist.foundation.param_role import ParamRole


@dataclass
class ParamShard:
    """A flat range [start, stop) of one parameter, as this rank holds it.

    Attributes:
        name: the parameter's name in the model.
        role: what kind of parameter it is.
        component: part of the model it belongs to ("encoder", ...).
        shape: the whole parameter's shape.
        start, stop: flat element range; may be empty (this rank owns nothing of it), never padding.
        value: fp32 view [stop - start] of the master weights; writing it changes the model after `Engine.refresh`.
        gradient: fp32 or lower view [stop - start] of the accumulated gradient, readable and writable between the last
            backward and the step; None outside that phase.
    """

    name: str
    role: ParamRole
    component: str
    shape: tuple[int, ...]
    start: int
    stop: int
    value: Tensor
    gradient: Tensor | None = None

    @property
    def num_elements(self) -> int:
        """Elements that this rank owns."""
        return self.stop - self.start


def owned_range(num_elements: int, rank: int, world_size: int) -> tuple[int, int]:
    """Flat range of `rank` when `num_elements` are cut into `world_size` equal pieces, the last one short."""
    piece = -(-num_elements // world_size)
    start = min(rank * piece, num_elements)
    return start, min(start + piece, num_elements)
