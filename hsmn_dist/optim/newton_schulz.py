"""Newton-Schulz: the nearest (semi-)orthogonal matrix by matrix products alone.

quintic: X <- a X + (b A + c A^2) X with A = X X^T and (a, b, c) = (3.4445, -4.7750, 2.0315), Jordan et al. 2024 ("Muon"):
after 5 steps singular values lie around 1, not at it. cubic: X <- 1.5 X - 0.5 A X, the classical iteration, exact but slow
(after 3 steps the median singular value of a random matrix is 0.17). Unusual: wide or tall, the products are on the smaller
side; the scale of the input does not matter, down to the smallest numbers.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Kind = Literal["quintic", "cubic"]
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: Tensor, num_steps: int = 5, kind: Kind = "quintic") -> Tensor:
    """[..., m, n] -> the same shape, singular values near 1 (zero matrices stay zero)."""
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if is_tall else matrix
    largest = x.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    x = x / largest  # so that squares neither overflow nor vanish
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    for _ in range(num_steps):
        gram = x @ x.mT
        if kind == "quintic":
            a, b, c = QUINTIC
            x = a * x + (b * gram + c * gram @ gram) @ x
        else:
            x = 1.5 * x - 0.5 * gram @ x
    return x.mT if is_tall else x


def matched_scale(matrix: Tensor) -> float:
    """Factor that gives an orthogonalised update the root mean square of an AdamW step (arXiv 2502.16982): 0.2 sqrt(max)."""
    return float(0.2 * max(matrix.shape[-2:]) ** 0.5)
