"""MemoryTree: compressed chunks to a binary tree of memory nodes; one call of the Aggregator for each level of a batch.

Unusual: a node is stored once (an odd last node moves up as itself), and every example of a batch gets exactly the tree
that it would have alone, whatever its number of leaves. C leaves give 2C - 1 nodes, height ceil(log2 C).
The number of Aggregator calls depends on the width of the batch: under ZeRO-3 gather this module as a whole
(`LanguageModel.gathered_whole`). Source: HSMN paper, Aggregator; hsmn.md section 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hsmn_dist.models.layers.low_rank import LowRankLinear


@dataclass(frozen=True)
class NodeLayout:
    """Where each of the 2C - 1 stored nodes sits in a tree of C leaves.

    Attributes:
        level: level of each node; leaves are level 0.
        first_leaf: first leaf of its span.
        last_leaf: one past the last leaf of its span, if all C leaves are there.
    """

    level: tuple[int, ...]
    first_leaf: tuple[int, ...]
    last_leaf: tuple[int, ...]

    @property
    def num_nodes(self) -> int:
        """Stored nodes."""
        return len(self.level)


@lru_cache(maxsize=256)
def node_layout(num_leaves: int) -> NodeLayout:
    """Layout of the tree over `num_leaves` leaves: level by level, left to right, promoted nodes not repeated."""
    level, first, last = [0] * num_leaves, list(range(num_leaves)), list(range(1, num_leaves + 1))
    width, height = num_leaves, 0
    while width > 1:
        height += 1
        for index in range(width // 2):
            level.append(height)
            first.append(index << height)
            last.append(min((index + 1) << height, num_leaves))
        width = (width + 1) // 2
    return NodeLayout(tuple(level), tuple(first), tuple(last))


class Tree(NamedTuple):
    """Nodes of a batch of trees. A tuple, because ZeRO-3 finds no tensors in other containers.

    Attributes:
        values: [B, N, k] node values; rows that an example does not have hold unused numbers.
        exists: [B, N] bool, True on the nodes of each example's own tree.
        is_valid: [B, N] bool, True on existing nodes whose span touches a real token.
    """

    values: Tensor
    exists: Tensor
    is_valid: Tensor


class Aggregator(nn.Module):
    """f(left, right) = W2 relu(W1 [left; right] + b1) + b2, both maps of low rank."""

    def __init__(self, d_compressed: int, d_inner: int, rank: int) -> None:
        super().__init__()
        self.inner = LowRankLinear(2 * d_compressed, d_inner, rank)
        self.outer = LowRankLinear(d_inner, d_compressed, rank)

    def forward(self, pairs: Tensor) -> Tensor:
        """Left and right children side by side [..., 2k] -> parents [..., k]."""
        return self.outer(F.relu(self.inner(pairs)))


class MemoryTree(nn.Module):
    """The tree over compressed chunks."""

    def __init__(self, d_compressed: int, d_inner: int, rank: int) -> None:
        super().__init__()
        self.aggregator = Aggregator(d_compressed, d_inner, rank)

    def forward(self, leaves: Tensor, has_tokens: Tensor, num_leaves: Tensor) -> Tree:
        """Build all trees of a batch.

        Args:
            leaves: [B, C, k] compressed chunks.
            has_tokens: [B, C] bool, True where the leaf's chunk holds a real token.
            num_leaves: [B] leaves that each example owns (1 to C).

        Returns:
            Nodes in the order of `node_layout(C)`, N = 2C - 1.
        """
        count = num_leaves[:, None]
        level, touches = leaves, has_tokens
        exists = torch.arange(leaves.shape[1], device=leaves.device) < count  # [B, C]
        values, masks, touched = [level], [exists], [touches]
        while level.shape[1] > 1:
            level, touches, is_merged = self._merge_level(level, touches, count)
            num_pairs = is_merged.shape[1]
            values.append(level[:, :num_pairs])
            masks.append(is_merged)
            touched.append(touches[:, :num_pairs])
            count = (count + 1) // 2
        exists = torch.cat(masks, dim=1)
        return Tree(torch.cat(values, dim=1), exists, exists & torch.cat(touched, dim=1))

    def _merge_level(self, level: Tensor, touches: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One level up: values [B, ceil(W / 2), k], their touch flags, and [B, W // 2] which of them are new nodes."""
        num_pairs = level.shape[1] // 2
        paired = level[:, : 2 * num_pairs].unflatten(1, (num_pairs, 2))  # [B, P, 2, k]
        pair_touches = touches[:, : 2 * num_pairs].unflatten(1, (num_pairs, 2))
        right_index = torch.arange(1, 2 * num_pairs, 2, device=level.device)
        is_merged = right_index < count  # [B, P]
        merged = self.aggregator(paired.flatten(2))
        values = torch.where(is_merged[..., None], merged, paired[:, :, 0].to(merged.dtype))
        flags = torch.where(is_merged, pair_touches.any(dim=2), pair_touches[:, :, 0])
        if level.shape[1] % 2:  # an odd last node of the widest tree moves up unchanged
            values = torch.cat([values, level[:, -1:].to(values.dtype)], dim=1)
            flags = torch.cat([flags, touches[:, -1:]], dim=1)
        return values, flags, is_merged
