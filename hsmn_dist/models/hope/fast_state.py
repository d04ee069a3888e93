"""Fast state: per-sequence memory as plain tensors with a leading batch axis, never Parameters.

Unusual: state goes into `forward` and a new one comes out; nothing is written in place, so recomputation under activation
checkpointing, branching generations and carried streams are all safe. Source: models.md 2.5 (Nested Learning, arXiv
2512.24695, section 7: the inner levels of each sequence are its own).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from hsmn_dist.foundation.errors import ModelError

StateType = TypeVar("StateType", bound="FastState")


@dataclasses.dataclass
class FastState:
    """Base of every state dataclass. Fields are tensors [B, ...], other states, lists or tuples of those, or None."""

    def mapped(self: StateType, function: Callable[[Tensor], Tensor]) -> StateType:
        """The same structure with `function` applied to every tensor."""
        changes = {f.name: _mapped(getattr(self, f.name), function) for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **changes)

    def detach(self: StateType) -> StateType:
        """Cut the history: the next segment's gradients stop here."""
        return self.mapped(Tensor.detach)

    def to(self: StateType, device: torch.device | str) -> StateType:
        """The same state on another device."""
        return self.mapped(lambda tensor: tensor.to(device))

    def rows(self: StateType, index: Tensor) -> StateType:
        """Rows `index` ([R] integers) of every tensor: reorder, repeat or drop sequences of the batch."""
        return self.mapped(lambda tensor: tensor.index_select(0, index))

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor, depth first, in field order."""
        for field in dataclasses.fields(self):
            yield from _tensors(getattr(self, field.name))

    def check_batch(self, batch_size: int) -> None:
        """Refuse a state that belongs to another number of sequences."""
        for tensor in self.tensors():
            if tensor.shape[0] != batch_size:
                raise ModelError(
                    f"a {type(self).__name__} of {tensor.shape[0]} sequences with a batch of {batch_size}",
                    allowed="a state of the same batch size: fast memory is never shared between sequences",
                    action="start a new state for this batch, or pick rows with state.rows(index)",
                )


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, FastState):
        return value.mapped(function)
    if isinstance(value, list | tuple):
        return type(value)(_mapped(item, function) for item in value)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, FastState):
        yield from value.tensors()
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
