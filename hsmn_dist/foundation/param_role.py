"""What a parameter is and how often it is updated, so that optimizers need not guess from shapes or names.

Models tag each parameter; `optim.param_groups` places it. Shapes cannot be used for this: under ZeRO-3 they are gone.
"""

from __future__ import annotations

import enum
from typing import NamedTuple


class ParamRole(enum.Enum):
    """MATRIX: a hidden weight matrix. VECTOR: biases, norms, scalars. EMBEDDING: token tables. HEAD: the output map."""

    MATRIX = "matrix"
    VECTOR = "vector"
    EMBEDDING = "embedding"
    HEAD = "head"


class ParamUpdate(NamedTuple):
    """How an optimizer treats a parameter.

    Attributes:
        period_steps: optimizer steps between two updates, with the gradient summed in between.
        rate_scale: its learning rate as a multiple of the optimizer's.
    """

    period_steps: int = 1
    rate_scale: float = 1.0


EVERY_STEP = ParamUpdate()
