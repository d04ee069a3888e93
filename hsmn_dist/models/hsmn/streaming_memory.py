"""StreamingMemory: a memory tree that grows with its context; an appended chunk touches O(log C) nodes.

Unusual: a finished chunk is never encoded again, and the nodes equal those of the whole context read at once. With a node
budget the level that holds most nodes lets go of its oldest one, provided that its parent is complete and stays: recent
text keeps its fine nodes, old text is left to coarse ones, and every chunk stays under some node. Inference only.
Source: models.md, Streaming; hsmn.md section 5, last line.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from hsmn_dist.foundation.errors import ModelError
from hsmn_dist.models.hsmn import bad_input
from hsmn_dist.models.hsmn.model import HsmnModel, HsmnState


@dataclass
class StoredNode:
    """One node: its value [B, k], and what the decoder sees of it [B, D] once somebody asked."""

    value: Tensor
    row: Tensor | None = None


@dataclass
class TreeLevel:
    """Nodes `offset`, `offset` + 1, ... of one level; the last one may be a promoted node of the level below."""

    offset: int = 0
    nodes: deque[StoredNode] = field(default_factory=deque)

    @property
    def width(self) -> int:
        """Nodes of this level, let go or not."""
        return self.offset + len(self.nodes)

    def node(self, index: int) -> StoredNode:
        """The node with this index in the level; it must not have been let go."""
        return self.nodes[index - self.offset]

    def replace_from(self, index: int, nodes: list[StoredNode]) -> None:
        """Cut the level at `index` and put `nodes` there."""
        while self.width > index:
            self.nodes.pop()
        self.nodes.extend(nodes)


class StreamingMemory:
    """Memory of a growing context for `batch_size` sequences that grow together.

    Args:
        model: in eval mode.
        batch_size: sequences.
        node_budget: largest number of stored nodes; 0 keeps all. About 3 nodes a level can never be let go.
    """

    def __init__(self, model: HsmnModel, batch_size: int = 1, node_budget: int = 0) -> None:
        if model.training:
            raise ModelError(
                "a model in training mode",
                allowed="a model in eval mode, so that dropout cannot change the memory",
                action="call model.eval() first",
            )
        self.model = model
        self.batch_size = batch_size
        self.node_budget = node_budget
        self.num_tokens = 0
        self.num_nodes_computed = 0
        self.levels: list[TreeLevel] = []
        device = next(model.parameters()).device
        self._tail = torch.zeros((batch_size, 0), dtype=torch.int64, device=device)
        self.append(self._tail)

    @property
    def num_chunks(self) -> int:
        """Leaves of the tree."""
        return self.model.chunker.num_chunks(self.num_tokens)

    @property
    def num_finished_chunks(self) -> int:
        """Chunks that are full and will never be encoded again."""
        chunker = self.model.chunker
        return max(0, (self.num_tokens - chunker.chunk_size) // chunker.chunk_stride + 1)

    @property
    def num_nodes(self) -> int:
        """Stored nodes; promoted ones count once."""
        return sum(self._num_merged(height) - level.offset for height, level in enumerate(self.levels))

    def _num_merged(self, height: int) -> int:
        """Nodes of this level that are its own, not promoted from below."""
        return self.num_chunks if height == 0 else self.levels[height - 1].width // 2

    @torch.no_grad()
    def append(self, token_ids: Tensor) -> None:
        """Read further tokens [B, t] of the context; t may be 0.

        Raises:
            ModelError: another batch size, or ids beyond the vocabulary.
        """
        bad_input.check_ids(token_ids, None, "context", self.model.config)
        if token_ids.shape[0] != self.batch_size:
            raise ModelError(
                f"{token_ids.shape[0]} sequences for a memory of {self.batch_size}",
                allowed=f"{self.batch_size} sequences",
                action="make a memory for the new batch",
            )
        if token_ids.shape[1] == 0 and self.levels:
            return
        first_open = self.num_finished_chunks
        self.num_tokens += token_ids.shape[1]
        self._tail = torch.cat([self._tail, token_ids], dim=1)
        self._grow(0, first_open, self._encode_tail(self.num_chunks - first_open))
        first_changed, height = first_open, 0
        while self.levels[height].width > 1:
            first_changed //= 2
            self._grow(height + 1, first_changed, self._parents(height, first_changed))
            height += 1
        stride = self.model.chunker.chunk_stride
        self._tail = self._tail[:, (self.num_finished_chunks - first_open) * stride :]
        self._let_go()

    def _grow(self, height: int, index: int, nodes: list[StoredNode]) -> None:
        if height == len(self.levels):
            self.levels.append(TreeLevel())
        self.levels[height].replace_from(index, nodes)

    def _encode_tail(self, num_chunks: int) -> list[StoredNode]:
        """Leaves of the open chunks, which all start inside the tail or behind it."""
        chunker = self.model.chunker
        missing = max(0, chunker.padded_tokens(num_chunks) - self._tail.shape[1])
        ids = F.pad(self._tail, (0, missing), value=chunker.pad_id)
        mask = F.pad(torch.ones_like(self._tail, dtype=torch.bool), (0, missing), value=False)
        ids = ids.unfold(1, chunker.chunk_size, chunker.chunk_stride)[:, :num_chunks]
        mask = mask.unfold(1, chunker.chunk_size, chunker.chunk_stride)[:, :num_chunks]
        leaves = self.model.encode_chunks(ids, mask, mask.any(dim=-1))
        self.num_nodes_computed += num_chunks
        return [StoredNode(value) for value in leaves.unbind(dim=1)]

    def _parents(self, height: int, first: int) -> list[StoredNode]:
        """Nodes `first` and above of level `height` + 1."""
        below = self.levels[height]
        children = [below.node(index) for index in range(2 * first, below.width)]
        pairs = list(zip(children[0::2], children[1::2], strict=False))
        parents = []
        if pairs:
            stacked = torch.stack([torch.cat([left.value, right.value], dim=-1) for left, right in pairs], dim=1)
            values = self.model.tree.aggregator(stacked)
            self.num_nodes_computed += len(pairs)
            parents = [StoredNode(value) for value in values.unbind(dim=1)]
        return parents + ([children[-1]] if len(children) % 2 else [])

    def _let_go(self) -> None:
        while self.node_budget and self.num_nodes > self.node_budget:
            sizes = [(level.offset - level.width, height) for height, level in enumerate(self.levels)]
            fullest = next((height for _, height in sorted(sizes) if self._may_drop(height)), None)
            if fullest is None:
                return
            self.levels[fullest].nodes.popleft()
            self.levels[fullest].offset += 1

    def _may_drop(self, height: int) -> bool:
        """True when the oldest node of a level has a parent that is stored and will never be computed again."""
        if height + 1 >= len(self.levels):
            return False
        parent = self.levels[height].offset // 2
        is_complete = (parent + 1) << (height + 1) <= self.num_finished_chunks
        return is_complete and parent >= self.levels[height + 1].offset

    @torch.no_grad()
    def nodes(self) -> tuple[Tensor, Tensor]:
        """Stored nodes as the decoder reads them: [B, N, D], and [B, N] bool, which touch a real token.

        Without a budget the order is that of `node_layout`.
        """
        places = [
            (height, index)
            for height, level in enumerate(self.levels)
            for index in range(level.offset, self._num_merged(height))
        ]
        stored = [self.levels[height].node(index) for height, index in places]
        fresh = [number for number, node in enumerate(stored) if node.row is None]
        if fresh:
            spans = [(places[number][0], *self._span(*places[number])) for number in fresh]
            table = torch.tensor(spans, device=self._tail.device).expand(self.batch_size, -1, -1)
            values = torch.stack([stored[number].value for number in fresh], dim=1)
            rows = self.model.decompress_nodes(values, table[..., 0], table[..., 1], table[..., 2])
            for number, row in zip(fresh, rows.unbind(dim=1), strict=True):
                stored[number].row = row
        stride = self.model.chunker.chunk_stride
        touches = [self._span(*place)[0] * stride < self.num_tokens for place in places]
        is_valid = torch.tensor(touches, device=self._tail.device).expand(self.batch_size, -1)
        return torch.stack([node.row for node in stored if node.row is not None], dim=1), is_valid

    def _span(self, height: int, index: int) -> tuple[int, int]:
        return index << height, min((index + 1) << height, self.num_chunks)

    def start(self) -> tuple[Tensor, HsmnState]:
        """Logits [B, V] of the first target token after the context so far, and a decoding state."""
        return self.model.start_from_memory(*self.nodes())
