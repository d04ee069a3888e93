"""Sum over examples of the squared gradient, from the factors that the rules give: formed, squared, added and dropped.

The gradient of one example is never stored for more than a block of a weight's rows, small enough to stay in the cache, so
that squaring costs little beside the product that forms it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hsmn_dist.continual.gradient_rules import Contribution, Dense, Outer, Scatter

_CPU_BLOCK_ENTRIES = 1 << 17
_GPU_BLOCK_ENTRIES = 1 << 26


@dataclass
class Use:
    """One use of a parameter in a forward pass.

    Attributes:
        contribution: factors with rows in front.
        owners: [rows] slot of each row (an example, or a group of examples), or None: row b is slot b.
    """

    contribution: Contribution
    owners: Tensor | None


def add_sum(uses: Sequence[Use], total: Tensor) -> None:
    """Total += gradient summed over all rows of all uses; `total` has the parameter's shape, fp32 or wider."""
    for use in uses:
        part = use.contribution
        if isinstance(part, Outer):
            right, left = _flat(part.right, total.dtype), _flat(part.left, total.dtype)
            total.addmm_(right.t(), left)
        elif isinstance(part, Scatter):
            ids, values = _kept(part.ids.reshape(-1), _flat(part.values, total.dtype))
            total.index_add_(0, ids, values)
        else:
            total.add_(part.values.sum(0).to(total.dtype).view(total.shape))


def add_squares(uses: Sequence[Use], num_slots: int, total: Tensor) -> None:
    """Total += sum over slots of (gradient of the slot's rows, all uses together)^2."""
    dense = [use for use in uses if isinstance(use.contribution, Dense)]
    outer = [use for use in uses if isinstance(use.contribution, Outer)]
    scatter = [use for use in uses if isinstance(use.contribution, Scatter)]
    if dense and not (outer or scatter):
        sums = _slot_sums(dense, num_slots, total)
        total.add_(torch.linalg.vecdot(sums, sums, dim=0).view(total.shape))
    elif scatter and not (outer or dense):
        _add_scatter_squares(scatter, total)
    elif len(outer) == 1 and not (scatter or dense) and outer[0].owners is None:
        _add_one_linear_squares(outer[0].contribution, num_slots, total)  # type: ignore[arg-type]
    elif outer or scatter:
        wholes = _slot_sums(dense, num_slots, total).view(num_slots, *total.shape) if dense else None
        _looped_blocks(_pieces_by_slot(outer, scatter, num_slots, total, wholes), total)


def slot_sums(use: Use, num_slots: int) -> Tensor:
    """[num_slots, *shape] gradients of each slot, from a `Dense` use."""
    values = use.contribution.values  # type: ignore[union-attr]
    if use.owners is None:
        return values
    sums = values.new_zeros((num_slots, *values.shape[1:]))
    return sums.index_add_(0, use.owners, values)


def _slot_sums(uses: Sequence[Use], num_slots: int, total: Tensor) -> Tensor:
    """[num_slots, elements]; of one use it may share the memory of its values."""
    if len(uses) == 1:
        return slot_sums(uses[0], num_slots).reshape(num_slots, -1).to(total.dtype)
    sums = total.new_zeros((num_slots, total.numel()))
    for use in uses:
        sums.add_(slot_sums(use, num_slots).reshape(num_slots, -1))
    return sums


def _flat(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.reshape(-1, values.shape[-1]).to(dtype)


def _kept(ids: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    keep = ids >= 0
    if bool(keep.all()):
        return (ids, *others)
    return (ids[keep], *(other[keep] for other in others))


def _place_owners(use: Use, places: Tensor) -> Tensor:
    """Slot of every place of a [rows, *] tensor, flattened."""
    rows = places.shape[0]
    owners = torch.arange(rows, device=places.device) if use.owners is None else use.owners
    return owners.repeat_interleave(places.numel() // max(1, rows))


def _add_scatter_squares(uses: Sequence[Use], total: Tensor) -> None:
    """Rows that share a slot and an id are added, squared, and added to the table's row."""
    size = total.shape[0]
    keys, values = [], []
    for use in uses:
        part = use.contribution
        assert isinstance(part, Scatter)
        ids, owners, rows = _kept(part.ids.reshape(-1), _place_owners(use, part.ids), _flat(part.values, total.dtype))
        keys.append(owners * size + ids)
        values.append(rows)
    pairs, places = torch.unique(torch.cat(keys), return_inverse=True)
    sums = total.new_zeros((pairs.numel(), total.shape[1])).index_add_(0, places, torch.cat(values))
    total.index_add_(0, pairs % size, sums.square_())


@dataclass
class _Piece:
    """What one slot's gradient of a weight [out, in] is the sum of: right^T left, lookups (ids sorted), and a whole."""

    left: Tensor
    right: Tensor
    table: tuple[Tensor, Tensor] | None = None
    whole: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        return self.left.shape[0] == 0 and self.table is None and self.whole is None


def _add_one_linear_squares(part: Outer, num_slots: int, total: Tensor) -> None:
    """A weight [out, in] used once, row b belonging to slot b."""
    left = part.left.reshape(num_slots, -1, part.left.shape[-1]).to(total.dtype)
    right = part.right.reshape(num_slots, -1, part.right.shape[-1]).to(total.dtype)
    if left.shape[1] == 1:  # one row an example: the square of a product is the product of squares
        total.addmm_(right[:, 0].square().t(), left[:, 0].square())
    elif total.is_cuda:
        _batched_blocks(left, right, total)
    else:
        _looped_blocks([_Piece(left[slot], right[slot]) for slot in range(num_slots)], total)


def _batched_blocks(left: Tensor, right: Tensor, total: Tensor) -> None:
    """Few large products, for a device on which every launch costs."""
    step = max(1, _GPU_BLOCK_ENTRIES // (left.shape[0] * left.shape[2]))
    for start in range(0, total.shape[0], step):
        gradients = torch.bmm(right[:, :, start : start + step].mT, left)  # [slots, block, in]
        total[start : start + step].add_(gradients.square_().sum(0))


def _looped_blocks(pieces: Sequence[_Piece], total: Tensor) -> None:
    """Small products whose result stays in the cache until it is squared and added: block of out rows by block."""
    entries = _GPU_BLOCK_ENTRIES if total.is_cuda else _CPU_BLOCK_ENTRIES
    step = max(1, entries // total.shape[1])
    workspace = total.new_empty((min(step, total.shape[0]), total.shape[1]))
    turned = [(piece, piece.right.t()) for piece in pieces if not piece.is_empty]
    for start in range(0, total.shape[0], step):
        block = total[start : start + step]
        gradient = workspace[: block.shape[0]]
        for piece, right in turned:
            torch.mm(right[start : start + step], piece.left, out=gradient)
            if piece.table is not None:
                ids, values = piece.table
                low, high = torch.searchsorted(ids, torch.tensor([start, start + step], device=ids.device)).tolist()
                gradient.index_add_(0, ids[low:high] - start, values[low:high])
            if piece.whole is not None:
                gradient.add_(piece.whole[start : start + step])
            block.addcmul_(gradient, gradient)


def _pieces_by_slot(
    outer: Sequence[Use], scatter: Sequence[Use], num_slots: int, total: Tensor, wholes: Tensor | None
) -> list[_Piece]:
    """All uses of each slot: rows of Linears one below the other, lookups of a tied table, sums of whole uses."""
    lefts: list[list[Tensor]] = [[total.new_empty(0, total.shape[1])] for _ in range(num_slots)]
    rights: list[list[Tensor]] = [[total.new_empty(0, total.shape[0])] for _ in range(num_slots)]
    for use in outer:
        part = use.contribution
        assert isinstance(part, Outer)
        for slot, (left, right) in enumerate(
            zip(_split(part.left, use, num_slots), _split(part.right, use, num_slots), strict=True)
        ):
            lefts[slot].append(left.reshape(-1, left.shape[-1]).to(total.dtype))
            rights[slot].append(right.reshape(-1, right.shape[-1]).to(total.dtype))
    tables = _tables_by_slot(scatter, num_slots, total.dtype) if scatter else [None] * num_slots
    return [
        _Piece(_joined(lefts[slot]), _joined(rights[slot]), tables[slot], None if wholes is None else wholes[slot])
        for slot in range(num_slots)
    ]


def _joined(parts: list[Tensor]) -> Tensor:
    kept = [part for part in parts if part.shape[0]] or parts[:1]
    return kept[0] if len(kept) == 1 else torch.cat(kept)


def _split(values: Tensor, use: Use, num_slots: int) -> Sequence[Tensor]:
    """Rows of each slot, in order."""
    if use.owners is None:
        return [values[slot] for slot in range(num_slots)]
    order = torch.argsort(use.owners, stable=True)
    counts = torch.bincount(use.owners, minlength=num_slots).tolist()
    is_sorted = bool((order[1:] > order[:-1]).all())
    return (values if is_sorted else values[order]).split(counts)


def _tables_by_slot(uses: Sequence[Use], num_slots: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor] | None]:
    """(sorted ids, values) of each slot's lookups."""
    tables: list[tuple[Tensor, Tensor] | None] = []
    split = [
        (_split(use.contribution.ids, use, num_slots), _split(use.contribution.values, use, num_slots))  # type: ignore[union-attr]
        for use in uses
    ]
    for slot in range(num_slots):
        ids = torch.cat([part[slot].reshape(-1) for part, _ in split])
        values = torch.cat([part[slot].reshape(-1, part[slot].shape[-1]) for _, part in split]).to(dtype)
        ids, values = _kept(ids, values)
        ids, order = torch.sort(ids)
        tables.append((ids, values[order]))
    return tables
