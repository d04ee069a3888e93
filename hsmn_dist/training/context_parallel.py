"""Context parallelism for HSMN: the chunks of a context are divided over a group of ranks, and their embeddings gathered.

Unusual: the only thing that travels is the compressed chunk, `d_compressed` numbers for 64 to 128 tokens of context. Ranks of a
group hold the same micro-batch; tree and decoder run on each of them. The adjoint of the all-gather is a reduce-scatter that
SUMS the gradients of all copies of the loss, so the mean over ranks that data parallelism takes anyway is the exact gradient for
every parameter: those of the tree and decoder (each rank has all of it, the mean of equal things) and those of the encoder
(each rank has n times its chunks' part, and the mean of those is the sum of the parts). Nothing else knows of it.

Related: Li et al. 2021, "Sequence Parallelism", arXiv 2105.13120, which has to move keys and values of every token instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hsmn_dist.config.training import TrainingConfig
from hsmn_dist.distributed.world import World
from hsmn_dist.foundation.errors import ConfigError


@dataclass
class ExchangedBytes:
    """What a rank has handed to the two collectives since the start.

    Attributes:
        forward, backward: bytes of embeddings, and of their gradients: chunks x d_compressed x element for each sequence.
        padding: bytes, of both together, that make the ranks' shares equally long: fewer than `ranks` rows a call.
        num_calls: collectives.
    """

    forward: int = 0
    backward: int = 0
    padding: int = 0
    num_calls: int = 0


class ChunkExchange:
    """This rank's part in one group; a `LeafExchange` for HsmnModel."""

    def __init__(self, group: dist.ProcessGroup, group_rank: int, group_size: int) -> None:
        self._group = group
        self._rank = group_rank
        self._size = group_size
        self.bytes = ExchangedBytes()

    def share(self, num_rows: int) -> slice:
        """See LeafExchange: contiguous shares of equal length, the last ones short or empty."""
        length = self._padded_share(num_rows)
        return slice(min(self._rank * length, num_rows), min((self._rank + 1) * length, num_rows))

    def gather(self, rows: Tensor, num_rows: int) -> Tensor:
        """See LeafExchange. Collective in the group, also backwards."""
        return _Gather.apply(rows, num_rows, self)  # type: ignore[no-any-return, no-untyped-call]

    def _padded_share(self, num_rows: int) -> int:
        return -(-num_rows // self._size)

    def all_gather(self, rows: Tensor, num_rows: int) -> Tensor:
        """Own rows [m, k] -> [num_rows, k]; without a gradient."""
        length = self._padded_share(num_rows)
        own = rows.new_zeros(length, rows.shape[1])
        own[: rows.shape[0]] = rows
        gathered = rows.new_empty(self._size * length, rows.shape[1])
        dist.all_gather_into_tensor(gathered, own, group=self._group)
        self.bytes.forward += self._count(num_rows, gathered)
        return gathered[:num_rows]

    def reduce_scatter(self, gradients: Tensor, num_rows: int) -> Tensor:
        """Gradients of all rows [num_rows, k] on every rank -> the sum over ranks of this rank's rows [m, k]."""
        length = self._padded_share(num_rows)
        padded = gradients.new_zeros(self._size * length, gradients.shape[1])
        padded[:num_rows] = gradients
        own = gradients.new_empty(length, gradients.shape[1])
        dist.reduce_scatter_tensor(own, padded, group=self._group)
        self.bytes.backward += self._count(num_rows, padded)
        share = self.share(num_rows)
        return own[: share.stop - share.start]

    def _count(self, num_rows: int, buffer: Tensor) -> int:
        payload = num_rows * buffer.shape[1] * buffer.element_size()
        self.bytes.padding += buffer.numel() * buffer.element_size() - payload
        self.bytes.num_calls += 1
        return payload


class _Gather(torch.autograd.Function):
    """All-gather forward, reduce-scatter of the summed gradients backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, num_rows: int, exchange: ChunkExchange) -> Tensor:
        ctx.num_rows, ctx.exchange = num_rows, exchange
        return exchange.all_gather(rows, num_rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.exchange.reduce_scatter(gradients[0].contiguous(), ctx.num_rows), None, None


def data_place(training: TrainingConfig, world: World) -> tuple[int, int]:
    """(data rank, data ranks): ranks of one context group read the same rows."""
    return world.rank // training.context_parallel, training.data_ranks(world.world_size)


def divide_context(model: nn.Module, training: TrainingConfig, world: World) -> ChunkExchange | None:
    """Give the model its exchange when `training.context_parallel` asks for one. Collective over all ranks.

    Raises:
        ConfigError: ranks that do not divide into groups, or a model whose context is not read in chunks.
    """
    size = training.context_parallel
    if size == 1:
        return None
    if world.world_size % size:
        raise ConfigError(
            f"training.context_parallel {size} on {world.world_size} ranks",
            allowed="a divisor of the number of ranks",
            action="change training.context_parallel or cluster.ranks_per_node",
        )
    if not hasattr(model, "leaf_exchange"):
        raise ConfigError(
            f"training.context_parallel {size} with {type(model).__name__}, which reads its context token by token",
            allowed="family hsmn or hsmn_hope; 1 with any family",
            action="set training.context_parallel to 1",
        )
    own: dist.ProcessGroup | None = None
    for first in range(0, world.world_size, size):  # every rank takes part in the making of every group
        group = dist.new_group(list(range(first, first + size)))
        if first <= world.rank < first + size:
            own = group
    assert own is not None
    exchange = ChunkExchange(own, world.rank % size, size)
    model.leaf_exchange = exchange  # type: ignore[assignment]
    return exchange


@contextlib.contextmanager
def undivided(model: nn.Module) -> Iterator[None]:
    """Within it every rank encodes whole contexts by itself: for what needs each example's own gradient (Fisher)."""
    exchange = getattr(model, "leaf_exchange", None)
    if exchange is None:
        yield
        return
    model.leaf_exchange = None  # type: ignore[assignment]
    try:
        yield
    finally:
        model.leaf_exchange = exchange
