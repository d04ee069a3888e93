"""What a parameter is, so that optimizers need not guess from shapes or names.

Models tag each parameter; `optim.param_groups` places it. Shapes cannot be used for this: under ZeRO-3 they are gone.
"""

from __future__ import annotations

import enum


class ParamRole(enum.Enum):
    """MATRIX: a hidden weight matrix. VECTOR: biases, norms, scalars. EMBEDDING: token tables. HEAD: the output map."""

    MATRIX = "matrix"
    VECTOR = "vector"
    EMBEDDING = "embedding"
    HEAD = "head"
