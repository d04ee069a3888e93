"""One rank owns one whole matrix: what Muon and M3 need when ZeRO hands every rank flat pieces.

Matrices are dealt to ranks by cost; two all-to-all exchanges a step bring pieces to the owner and results back. Every number
travels unchanged, so N ranks compute what one computes. Unusual: nothing is said here of update rules, only of who holds what.
Source of the idea: the owner-per-matrix scheme of distributed Muon (Liu et al. 2025, arXiv 2502.16982, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hsmn_dist.distributed.collectives import all_gather_objects, rank_and_world_size


def choose_owners(costs: Sequence[float], world_size: int) -> list[int]:
    """Owner of each matrix: the most costly first, each to the rank with the least so far (ties to the lower rank)."""
    loads = [0.0] * world_size
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner = min(range(world_size), key=lambda rank: (loads[rank], rank))
        owners[index] = owner
        loads[owner] += costs[index]
    return owners


def matrix_cost(shape: Sequence[int]) -> float:
    """Multiplications of one Newton-Schulz step, up to a factor: elements times the smaller side."""
    return float(shape[0]) * float(shape[1]) * float(min(shape))


class MatrixExchange:
    """Moves a list of matrices between flat pieces and their owners. Construction and every method are collective."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], ranges: Sequence[tuple[int, int]]) -> None:
        """`shapes` are equal on all ranks; `ranges` are the flat elements [start, stop) of each that this rank holds."""
        self._rank, self._world_size = rank_and_world_size()
        self._shapes = [tuple(shape) for shape in shapes]
        self._ranges = all_gather_objects([tuple(pair) for pair in ranges])
        self._owners = choose_owners([matrix_cost(shape) for shape in self._shapes], self._world_size)

    @property
    def owned(self) -> list[int]:
        """Indices of the matrices that this rank owns."""
        return [index for index, owner in enumerate(self._owners) if owner == self._rank]

    def gather(self, pieces: Sequence[Tensor]) -> dict[int, Tensor]:
        """This rank's pieces of all matrices, each [stop - start] -> the whole matrices that it owns, by index."""
        sent = [torch.cat([pieces[0][:0], *(pieces[i] for i in self._of(rank))]) for rank in self._ranks]
        sizes = [sum(self._size(rank, i) for i in self.owned) for rank in self._ranks]
        received = self._exchange(sent, sizes)
        wholes = {i: pieces[0].new_zeros(torch.Size(self._shapes[i]).numel()) for i in self.owned}
        for rank, part in zip(self._ranks, received, strict=True):
            offset = 0
            for i in self.owned:
                start, stop = self._ranges[rank][i]
                wholes[i][start:stop] = part[offset : offset + stop - start]
                offset += stop - start
        return {i: whole.view(self._shapes[i]) for i, whole in wholes.items()}

    def scatter(self, wholes: Mapping[int, Tensor], like: Tensor) -> list[Tensor]:
        """The inverse: owned matrices -> this rank's pieces of all matrices. `like` gives type and device."""
        sent = []
        for rank in self._ranks:
            parts = [wholes[i].reshape(-1)[slice(*self._ranges[rank][i])] for i in self.owned]
            sent.append(torch.cat([like.view(-1)[:0], *parts]))
        sizes = [sum(self._size(self._rank, i) for i in self._of(rank)) for rank in self._ranks]
        received = self._exchange(sent, sizes)
        pieces: list[Tensor] = [like.view(-1)[:0]] * len(self._shapes)
        for rank, part in zip(self._ranks, received, strict=True):
            offset = 0
            for i in self._of(rank):
                size = self._size(self._rank, i)
                pieces[i] = part[offset : offset + size]
                offset += size
        return pieces

    @property
    def _ranks(self) -> range:
        return range(self._world_size)

    def _of(self, rank: int) -> list[int]:
        return [index for index, owner in enumerate(self._owners) if owner == rank]

    def _size(self, rank: int, index: int) -> int:
        start, stop = self._ranges[rank][index]
        return stop - start

    def _exchange(self, sent: list[Tensor], sizes: list[int]) -> list[Tensor]:
        """Entry r of `sent` goes to rank r; the answer's entry r (of `sizes[r]` elements) came from rank r."""
        if self._world_size == 1:
            return sent
        joined = torch.cat(sent)
        received = joined.new_empty(sum(sizes))
        dist.all_to_all_single(received, joined, sizes, [part.numel() for part in sent])
        return list(received.split(sizes))
