"""LeafExchange: what HsmnModel needs from whoever divides the chunks of a context over several devices.

Unusual: the model knows nothing of ranks; it encodes the rows that it is told to, and hands them over for all of them.
`training/context_parallel.py` is the one implementation.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class LeafExchange(Protocol):
    """Divides R encoded rows over parties that all hold the same batch."""

    def share(self, num_rows: int) -> slice:
        """Which of `num_rows` rows this party encodes; may be empty."""
        ...

    def gather(self, rows: Tensor, num_rows: int) -> Tensor:
        """Own rows [m, k] -> the rows of all parties [num_rows, k], differentiable."""
        ...
