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

_CPU_BLOCK_ENTRIES = 1 << 18
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
    if dense and (outer or scatter):
        raise NotImplementedError("a parameter used both as a whole and through a Linear or an Embedding")
    if dense:
        total.add_(_slot_sums(dense, num_slots, total).square_().sum(0).view(total.shape))
    elif outer:
        _add_outer_squares(outer, scatter, num_slots, total)
    elif scatter:
        _add_scatter_squares(scatter, total)


def slot_sums(use: Use, num_slots: int) -> Tensor:
    """[num_slots, *shape] gradients of each slot, from a `Dense` use."""
    values = use.contribution.values  # type: ignore[union-attr]
    if use.owners is None:
        return values
    sums = values.new_zeros((num_slots, *values.shape[1:]))
    return sums.index_add_(0, use.owners, values)


def _slot_sums(uses: Sequence[Use], num_slots: int, total: Tensor) -> Tensor:
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


def _add_outer_squares(outer: Sequence[Use], scatter: Sequence[Use], num_slots: int, total: Tensor) -> None:
    """Weights [out, in]: block of out rows by block, example by example. `scatter` holds the uses of a tied table."""
    if len(outer) == 1 and not scatter and outer[0].owners is None:
        part = outer[0].contribution
        assert isinstance(part, Outer)
        left = part.left.reshape(num_slots, -1, part.left.shape[-1]).to(total.dtype)
        right = part.right.reshape(num_slots, -1, part.right.shape[-1]).to(total.dtype)
        if left.shape[1] == 1:  # one row an example: the square of a product is the product of squares
            total.addmm_(right[:, 0].square().t(), left[:, 0].square())
            return
        if total.is_cuda:
            _batched_blocks(left, right, total)
            return
        pairs = [(left[slot], right[slot]) for slot in range(num_slots)]
        _looped_blocks(pairs, [None] * num_slots, total)
        return
    pairs = _pairs_by_slot(outer, num_slots, total.dtype)
    tables = _tables_by_slot(scatter, num_slots, total.dtype) if scatter else [None] * num_slots
    _looped_blocks(pairs, tables, total)


def _batched_blocks(left: Tensor, right: Tensor, total: Tensor) -> None:
    """Few large products, for a device on which every launch costs."""
    step = max(1, _GPU_BLOCK_ENTRIES // (left.shape[0] * left.shape[2]))
    for start in range(0, total.shape[0], step):
        gradients = torch.bmm(right[:, :, start : start + step].mT, left)  # [slots, block, in]
        total[start : start + step].add_(gradients.square_().sum(0))


def _looped_blocks(
    pairs: Sequence[tuple[Tensor, Tensor]], tables: Sequence[tuple[Tensor, Tensor] | None], total: Tensor
) -> None:
    """Small products whose result stays in the cache until it is squared and added."""
    entries = _GPU_BLOCK_ENTRIES if total.is_cuda else _CPU_BLOCK_ENTRIES
    step = max(1, entries // total.shape[1])
    workspace = total.new_empty((min(step, total.shape[0]), total.shape[1]))
    for start in range(0, total.shape[0], step):
        block = total[start : start + step]
        gradient = workspace[: block.shape[0]]
        for (left, right), table in zip(pairs, tables, strict=True):
            if left.shape[0] == 0 and table is None:
                continue
            torch.mm(right[:, start : start + step].t(), left, out=gradient)
            if table is not None:
                ids, values = table
                low, high = torch.searchsorted(ids, torch.tensor([start, start + step], device=ids.device)).tolist()
                gradient.index_add_(0, ids[low:high] - start, values[low:high])
            block.addcmul_(gradient, gradient)


def _pairs_by_slot(uses: Sequence[Use], num_slots: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """(left [n, in], right [n, out]) of each slot, all uses one below the other."""
    lefts: list[list[Tensor]] = [[] for _ in range(num_slots)]
    rights: list[list[Tensor]] = [[] for _ in range(num_slots)]
    for use in uses:
        part = use.contribution
        assert isinstance(part, Outer)
        for slot, (left, right) in enumerate(
            zip(_split(part.left, use, num_slots), _split(part.right, use, num_slots), strict=True)
        ):
            lefts[slot].append(left.reshape(-1, left.shape[-1]).to(dtype))
            rights[slot].append(right.reshape(-1, right.shape[-1]).to(dtype))
    return [(_joined(a), _joined(b)) for a, b in zip(lefts, rights, strict=True)]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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
