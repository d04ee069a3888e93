"""HOPE's memories one token at a time: slow, obvious, for parity tests and for readers.

Every function works on one sequence and one head (no batch axis), in the order of the equations, with Python loops.
Equation numbers are those of models.md section 2 and of arXiv 2512.24695 as read through secondary copies.
"""

from __future__ import annotations

import torch
from torch import Tensor


def decayed_read_steps(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gains: Tensor,
    taus: Tensor,
    memory: Tensor | None = None,
    *,
    scales: Tensor | None = None,
    reads_after_write: bool = True,
) -> tuple[Tensor, Tensor]:
    """Decay-form CMS (models.md 2.2).

    Args:
        query: [T, K].
        key: [T, K].
        value: [T, J].
        gains: [T, M].
        taus: [M].
        memory: [M, K, J] or None for zeros.
        scales: [M] write weights; 1 - tau unless given.
        reads_after_write: token t sees its own write.

    Returns:
        Reads [T, J] and the memory after the last token.
    """
    scales = 1.0 - taus if scales is None else scales
    if memory is None:
        memory = query.new_zeros(len(taus), key.shape[1], value.shape[1])
    reads = []
    for t in range(len(query)):
        before = memory
        written = torch.outer(key[t], value[t])
        memory = torch.stack([taus[m] * memory[m] + scales[m] * written for m in range(len(taus))])
        seen = memory if reads_after_write else before
        # o_t = sum_m g_m(x_t) S_m[t]^T q_t
        reads.append(torch.stack([gains[t, m] * (seen[m].mT @ query[t]) for m in range(len(taus))]).sum(0))
    return torch.stack(reads), memory
