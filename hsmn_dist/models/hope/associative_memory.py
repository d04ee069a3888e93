"""AssociativeMemory: store key-value pairs, retrieve values by similarity of keys; a part usable alone.

Retrieval is softmax(beta cos(query, key)) over the stored pairs, or over the best `top_k` of them (the update of a modern
Hopfield network, Ramsauer et al. 2021, arXiv 2008.02217, equation 3). Unusual: like all fast state the memory is a plain
structure that goes in and comes out; each sequence has its own; with a capacity the oldest pairs are let go first.
Nested Learning's definition (arXiv 2512.24695, section 3.1): an operator that maps keys to values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.models.hope.fast_state import FastState


@dataclass
class StoredPairs(FastState):
    """keys [B, N, K] (normalised) and values [B, N, J]."""

    keys: Tensor
    values: Tensor


class AssociativeMemory:
    """Store and retrieve by similarity; holds settings only, the pairs are in `StoredPairs`.

    Args:
        d_key: K.
        d_value: J.
        capacity: pairs kept for each sequence, the newest; 0 keeps all.
        sharpness: beta; large values return the nearest value.
    """

    def __init__(self, d_key: int, d_value: int, capacity: int = 0, sharpness: float = 16.0) -> None:
        if d_key < 1 or d_value < 1 or capacity < 0 or sharpness <= 0:
            raise ModelError(
                f"d_key {d_key}, d_value {d_value}, capacity {capacity}, sharpness {sharpness}",
                allowed="widths of 1 or more, a capacity of 0 or more, a sharpness above 0",
                action="correct the argument",
            )
        self.d_key, self.d_value, self.capacity, self.sharpness = d_key, d_value, capacity, sharpness

    def empty(self, batch: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> StoredPairs:
        """A memory without pairs for `batch` sequences."""
        options = {"device": device, "dtype": dtype}
        return StoredPairs(
            torch.zeros(batch, 0, self.d_key, **options),  # type: ignore[call-overload]
            torch.zeros(batch, 0, self.d_value, **options),  # type: ignore[call-overload]
        )

    def store(self, pairs: StoredPairs, keys: Tensor, values: Tensor) -> StoredPairs:
        """Append keys [B, N, K] and values [B, N, J]; the oldest pairs beyond the capacity are dropped."""
        pairs.check_batch(keys.shape[0])
        if keys.shape[-1] != self.d_key or values.shape[-1] != self.d_value or keys.shape[:2] != values.shape[:2]:
            raise ModelError(
                f"keys {tuple(keys.shape)} and values {tuple(values.shape)}",
                allowed=f"[B, N, {self.d_key}] and [B, N, {self.d_value}]",
                action="give one value for each key",
            )
        keys = torch.cat([pairs.keys, torch.nn.functional.normalize(keys, dim=-1).to(pairs.keys.dtype)], 1)
        values = torch.cat([pairs.values, values.to(pairs.values.dtype)], 1)
        if self.capacity:
            keys, values = keys[:, -self.capacity :], values[:, -self.capacity :]
        return StoredPairs(keys, values)

    def retrieve(self, pairs: StoredPairs, queries: Tensor, top_k: int = 0) -> tuple[Tensor, Tensor]:
        """Values [B, Q, J] for queries [B, Q, K], and the similarity [B, Q] of the nearest key.

        An empty memory answers zeros with similarity 0. `top_k` 0 mixes over all pairs.
        """
        pairs.check_batch(queries.shape[0])
        if pairs.keys.shape[1] == 0:
            return queries.new_zeros(*queries.shape[:2], self.d_value), queries.new_zeros(queries.shape[:2])
        similarity = torch.nn.functional.normalize(queries, dim=-1).to(pairs.keys.dtype) @ pairs.keys.mT  # [B, Q, N]
        nearest = similarity.amax(-1)
        if top_k and top_k < similarity.shape[-1]:
            least = similarity.topk(top_k, -1).values[..., -1:]
            similarity = similarity.masked_fill(similarity < least, float("-inf"))
        return torch.softmax(self.sharpness * similarity, -1) @ pairs.values, nearest
