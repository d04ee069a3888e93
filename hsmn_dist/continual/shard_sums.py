"""Full-size local sums of each parameter, added up over ranks into the flat ranges that each rank owns.

Two ways. Where every rank holds whole weights anyway (one process, ZeRO 0 to 2), a rank keeps one whole fp32 buffer per
parameter and everything is reduced once, at `totals`. Where weights are partitioned (ZeRO-3), a parameter's sum is reduced
as soon as the backward pass has it and dropped, so no rank ever holds a whole model's worth.

Ranks must call collectives in one order, but a rank whose batch is empty may finish parameters in another order: sums are
therefore reduced in a fixed order (last parameter first, about the order of a backward pass), and one that comes early waits.
The group is separate from the one on which ZeRO gathers weights.

Source: continual.md section 3, "Under ZeRO-3".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hsmn_dist.distributed.collectives import all_gather_objects
from hsmn_dist.distributed.shards import ParamShard, owned_range

_BUCKET_ELEMENTS = 1 << 24


class ShardSums:
    """Sums over micro-batches and ranks, one [stop - start] tensor per shard.

    `buffer(name)` gives the parameter's whole-size tensor to add to, `done(name)` says that this pass is finished with it,
    `end_pass()` that the pass is over. All three are called by every rank for every pass; `totals()` is collective too.
    """

    def __init__(self, shards: Sequence[ParamShard], keeps_whole: bool, device: torch.device | None = None) -> None:
        """`keeps_whole` False reduces each parameter as soon as it is done (ZeRO-3).

        `device` is where gradients are made; None: where the shards live (they live elsewhere under offload).
        """
        self.keeps_whole = keeps_whole
        self._shards = list(shards)
        self._device = device
        self._place = {shard.name: place for place, shard in enumerate(shards)}
        self._local = [torch.zeros_like(shard.value) for shard in shards]
        self._whole: dict[int, Tensor] = {}
        self._ranges = all_gather_objects([(shard.start, shard.stop) for shard in shards])
        self._world_size = len(self._ranges)
        self._group = dist.new_group() if self._world_size > 1 and not keeps_whole else None
        self._next = len(self._shards) - 1
        self._is_done: set[int] = set()
        self._bucket: list[int] = []

    def buffer(self, name: str) -> Tensor:
        """The whole parameter's sum on this rank, in the parameter's shape; zeros when it is new."""
        place = self._place[name]
        if place not in self._whole:
            self._whole[place] = self.new_buffer(name)
        return self._whole[place]

    def new_buffer(self, name: str) -> Tensor:
        """A zero tensor of the parameter's shape that belongs to nobody."""
        shard = self._shards[self._place[name]]
        dtype = torch.promote_types(shard.value.dtype, torch.float32)
        return torch.zeros(shard.shape, dtype=dtype, device=self._device or shard.value.device)

    def done(self, name: str) -> None:
        """This pass adds nothing more to `name`."""
        if not self.keeps_whole:
            self._is_done.add(self._place[name])
            self._advance(only_done=True)

    def end_pass(self) -> None:
        """The backward pass is over: reduce what is left."""
        if not self.keeps_whole:
            self._advance(only_done=False)
            self._reduce_bucket()
            self._next = len(self._shards) - 1
            self._is_done.clear()

    def totals(self, clears: bool = False) -> list[Tensor]:
        """This rank's ranges of the sums over all ranks and passes; with `clears`, start again from zero."""
        if self.keeps_whole:
            for place in range(len(self._shards)):
                self._put_into_bucket(place)
            self._reduce_bucket()
        totals = self._local
        if clears:
            self._local = [torch.zeros_like(total) for total in totals]
            return totals
        return [total.clone() for total in totals]

    def restore(self, totals: Sequence[Tensor]) -> None:
        """Continue from the totals of an interrupted pass."""
        for mine, saved in zip(self._local, totals, strict=True):
            mine.copy_(saved)

    def close(self) -> None:
        """End the reduction group."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _advance(self, only_done: bool) -> None:
        while self._next >= 0 and (not only_done or self._next in self._is_done):
            self._put_into_bucket(self._next)
            self._next -= 1

    def _put_into_bucket(self, place: int) -> None:
        """Reduce many small parameters together; the bucket's limits are the same on every rank."""
        if self._world_size == 1:
            whole = self._whole.pop(place, None)
            if whole is not None:
                shard = self._shards[place]
                self._local[place].add_(whole.view(-1)[shard.start : shard.stop].to(self._local[place].device))
            return
        self._bucket.append(place)
        if sum(torch.Size(self._shards[p].shape).numel() for p in self._bucket) >= _BUCKET_ELEMENTS:
            self._reduce_bucket()

    def _reduce_bucket(self) -> None:
        places, self._bucket = self._bucket, []
        if not places:
            return
        wholes = [self.buffer(self._shards[place].name).view(-1) for place in places]
        for place in places:
            del self._whole[place]
        pieces = [
            _equal_piece([r[place] for r in self._ranges], w.numel()) for place, w in zip(places, wholes, strict=True)
        ]
        if all(piece is not None for piece in pieces):
            mine = self._scattered(wholes, [piece or 0 for piece in pieces])
        else:
            flat = torch.cat(wholes)
            dist.all_reduce(flat, group=self._group)
            mine = [
                part[self._shards[place].start : self._shards[place].stop]
                for place, part in zip(places, flat.split([w.numel() for w in wholes]), strict=True)
            ]
        for place, part in zip(places, mine, strict=True):
            local = self._local[place]
            local.add_(part[: local.numel()].to(local.device))

    def _scattered(self, wholes: list[Tensor], pieces: list[int]) -> list[Tensor]:
        """Each rank's equal pieces of all tensors, by one reduce-scatter of [ranks, sum of pieces]."""
        columns = [
            torch.nn.functional.pad(whole, (0, piece * self._world_size - whole.numel())).view(self._world_size, piece)
            for whole, piece in zip(wholes, pieces, strict=True)
        ]
        mine = wholes[0].new_empty(sum(pieces))
        dist.reduce_scatter_tensor(mine, torch.cat(columns, dim=1).view(-1), group=self._group)
        return list(mine.split(pieces))


def _equal_piece(ranges: Sequence[tuple[int, int]], num_elements: int) -> int | None:
    """Elements per rank when the ranks own equal pieces in rank order (ZeRO-3), else None."""
    world_size = len(ranges)
    if num_elements == 0 or any(
        tuple(own) != owned_range(num_elements, rank, world_size) for rank, own in enumerate(ranges)
    ):
        return None
    return -(-num_elements // world_size)
